"""Work on gradients beside a step: clipping by itself, and a scaler for mixed precision."""
