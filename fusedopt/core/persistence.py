"""Checkpoints and copies of an optimizer, and the names of parameters in them."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from fusedopt.core import backends, checkpoint, checks, limit_state, peers
from fusedopt.core.check_formats import check_shards
from fusedopt.core.checkpoint import SHARE
from fusedopt.core.names import ParamNames, check_named
from fusedopt.core.provisional_state import ProvisionalState
from fusedopt.core.readings import Readings
from fusedopt.core.settings import TORCHS
from fusedopt.core.state import is_new, make_complete, take_counts, with_counts
from fusedopt.distributed import Share, local_of
from fusedopt.reference import Control, Group, distinct_params
from fusedopt.reference.groups import name_of
from fusedopt.reference.limits import AdaptiveClip


class Persistence(Readings):
    """torch's protocol for checkpoints and copies."""

    def name_params(self, named: torch.nn.Module | Iterable[tuple[str, Tensor]]) -> None:
        """Names the parameters, as if the optimizer was made with `model.named_parameters()`.

        Trainers often make the param groups without names. The names appear in `explain()`,
        telemetry, logs, errors and checkpoints. A parameter that isn't in `named` keeps its name;
        if it has none, it is named by its place.

        Args:
            named: a module, or pairs of a name and a parameter. Parameters that this optimizer
                doesn't have are ignored.

        Raises:
            TypeError: `named` is something else.
            ValueError: two parameters have one name, or none of them is this optimizer's.
        """
        pairs = check_named(named)
        ours = {id(param) for _, param in distinct_params(self.param_groups)}
        pairs = [pair for pair in pairs if id(pair[0]) in ours]
        if not pairs:
            raise ValueError(
                f"name_params was given a {type(named).__name__} that has no parameter of this "
                f"{type(self).__name__}; expected the model whose parameters it updates"
            )
        with self._lock:
            self._follow_names()
            self._names.add(pairs)
            self._follow_names()

    @_disable_dynamo
    @torch.inference_mode(False)
    @torch.no_grad()
    def init_state(self) -> None:
        """Makes the state that first steps would make, of zeros, for every trainable parameter.

        Then a checkpoint that writes to existing tensors, as `torch.distributed.checkpoint` does,
        can be loaded before the first step. It takes no step, changes no parameter, counts nothing
        and doesn't communicate. What has a state keeps it.

        Raises:
            TypeError, RuntimeError: a parameter is of a kind that no step can update, or a CUDA
                graph is captured.
        """
        with self._lock:
            self._follow_names()
            new = [
                (group, param, name_of(self.param_groups, g, i))
                for g, group in enumerate(self.param_groups)
                for i, param in enumerate(group["params"])
                if self._lacks_state(param)
            ]
            for group, param, name in new:
                checks.check_param(local_of(param), name, self._backend)
                checks.check_new_state(name, "init_state()")
                check_shards(group, param, name)
            counters = self._provisional_state.counters
            try:
                for group, param, _ in new:
                    make_complete(self.rule, group, param, self.state, counters)
            except BaseException:
                self._provisional_state.drop([param for _, param, _ in new], self.state)
                raise
            self._own["plan"] = None

    def _lacks_state(self, param: Tensor) -> bool:
        fits = param.requires_grad and not torch.nn.parameter.is_lazy(param)
        fits = fits and not param.is_meta and self._keeps(param)
        return fits and is_new(self.state.get(param))

    @_disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """The same as torch's. It may wait for the device to learn which new states were used.

        The state of an adaptive limit is in the first param group, under "max_grad_norm_state". The
        state of a tensor that is no longer in a param group is left out.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        with self._lock:
            state_dict = self._state_dict()
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        return state_dict

    def _state_dict(self) -> dict[str, Any]:
        self._follow_names()
        used = self._provisional_state.used(self.rule, self.state)
        used = with_counts(self.rule, self.param_groups, used, self._provisional_state.counters)
        state_dict = checkpoint.save(self.param_groups, used)
        if (share := self._share_label()) is not None:
            state_dict[SHARE] = share
        if isinstance(limit := self.max_grad_norm, AdaptiveClip):
            learned = limit_state.save(
                limit, self._own["clip_state"], self._own["clip_params"], self.param_groups
            )
            if learned is not None:
                state_dict["param_groups"][0][limit_state.KEY] = learned
        return state_dict

    def _share_label(self) -> dict[str, Any] | None:
        """Of an optimizer with the states of its rank only: which ones. None: it has all."""
        share: Share | None = self._own["share"]
        if share is None or share.size == 1:
            return None
        kept = [i for i, owner in enumerate(share.owners.values()) if owner == share.rank]
        return {"rank": share.rank, "ranks": share.size, "params": kept}

    @_disable_dynamo
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads the `state_dict()` of an optimizer of this class or of its torch twin.

        Those of bitsandbytes, torchao, FlashOptim, TransformerEngine and apex are recognized and
        converted: see docs/precision.md.

        Like torch's, it takes over the tensors of `state_dict`, and steps write to them. Load a
        `copy.deepcopy` to keep the original. A tensor is copied if its device, dtype or layout is
        another one, or if writing to it would be wrong: a tensor of a memory-mapped file, of
        inference mode, of autograd, or one that shares memory. Unlike torch's,

        * a state keeps its dtype; if the dtype doesn't suit the parameter, it becomes float32, or
          float64 for float64 parameters;
        * if both sides have names of parameters, the names count and not the order;
        * `foreach`, `fused`, `capturable` and `differentiable` are not loaded;
        * a checkpoint that doesn't fit, or a load that is interrupted, changes nothing.

        The number of steps goes on from the largest "step" in the state, which doesn't count
        skipped steps. FusedSGD's state has no "step"; its own count goes on.

        Raises:
            TypeError, ValueError, RuntimeError: the checkpoint doesn't fit; the message says where.
        """
        state_dict = dict(state_dict) if isinstance(state_dict, Mapping) else state_dict
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        with self._lock:
            own, attributes = self._loaded(state_dict)
            before = self._own.copy()  # replaced tensors are freed at the end
            # No signal interrupts this one call: all of the optimizer changes, or nothing.
            self._own.update(own)
            self.__dict__.update(attributes)
        del before
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _loaded(self, state_dict: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Computes the changes of a checkpoint, and changes nothing yet.

        Returns:
            New items of `_own`, and new attributes. Only derived classes have such attributes; a
            wrapper's are left out.
        """
        names = self._names.of(self.param_groups)
        state_dict = peers.unwrapped(state_dict)
        read = checkpoint.read(state_dict, names)
        checkpoint.check_share(state_dict, self._share_label())
        read = peers.translated(self.rule, self.param_groups, read)
        groups = checkpoint.load_groups(self.param_groups, names, read)
        # torch's classes fill in the options that older checkpoints lack.
        self._twin().__setstate__({"state": {}, "param_groups": groups})
        for index, group in enumerate(groups):
            checks.check_options(self.rule, index, group, self.defaults, self._settings())
        states = checkpoint.load_state(self.rule, groups, read, self._keeps)
        counts = take_counts(self.rule, groups, states)
        loaded = self._twin()
        # torch's classes expect a `step` in every state: hide states with only a user's items.
        begun = {k: it for k, it in states.items() if isinstance(k, Tensor) and not is_new(it)}
        loaded.__setstate__({"state": begun, "param_groups": groups})
        loaded._own["state"] = states
        loaded._own["provisional_state"].counters.update(counts)
        loaded._own |= {**self._loaded_count(read), **self._loaded_limit(groups, read)}
        attributes = loaded.__dict__
        own = _changed(self._own, attributes.pop("_own"))
        is_wrapper = "_own" not in self.__dict__
        return own, {} if is_wrapper else _changed(self.__dict__, attributes)

    def _twin(self) -> Persistence:
        """A copy of this optimizer, whose attributes may be changed."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__, _own=self._own.copy())
        return twin

    @torch.inference_mode(False)
    def _loaded_count(self, read: checkpoint.Checkpoint) -> dict[str, Any]:
        """Sets the number of steps to the checkpoint's. Earlier telemetry is another run's."""
        loaded = [read.state[key] for key in set(read.listed) & read.state.keys()]
        before = [it for param, it in self.state.items() if isinstance(param, Tensor)]
        steps = checkpoint.largest_step(self.rule, loaded)
        if steps is None or steps == checkpoint.largest_step(self.rule, before):
            return {}
        control = self._readings().clone()
        control[Control.STEPS] = steps
        return {"control": control, "loaded_steps": steps}

    def _loaded_limit(self, groups: list[Group], read: checkpoint.Checkpoint) -> dict[str, Any]:
        places = checkpoint.params_by_id(groups, read)
        listed = [places[key] for key in dict.fromkeys(read.listed)]
        params = [list(groups[group]["params"])[index] for group, index in listed]
        state = limit_state.load(self.max_grad_norm, read.limit, groups, params)
        return {
            "clip_state": state,
            "clip_params": [param for _, param in distinct_params(groups)],
        }

    def __getstate__(self) -> dict[str, Any]:
        self._follow_names()
        kept = ("_backend", "_rings", "_names")
        own = {
            **self._own,
            "plan": None,
            "ranks": None,
            "together": None,
            "view": backends.new_view(),
            "last_message": None,
            "counted": None,
            "scratch": {},
            "second_half": None,
        }
        return {"_own": own, **{name: getattr(self, name) for name in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_own" in state:  # a copy, or from a pickle
            self._lock = threading.RLock()
            self._own = state["_own"]
        else:  # load_state_dict: everything has moved, and no loaded state is provisional
            self._own |= {key: state[key] for key in TORCHS if key in state}
            self._own |= {"plan": None, "provisional_state": ProvisionalState()}
            state = {key: value for key, value in state.items() if key not in TORCHS}
        if "_names" not in state and not hasattr(self, "_names"):
            self._names = ParamNames()
        super().__setstate__(state)


def _changed(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in now.items()
        if name not in before or value is not before[name]
    }
