"""torch's protocol around one fused step."""
