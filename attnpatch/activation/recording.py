"""Captures every call of an automatically patched model into files. An error ends a capture, never the script."""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

from torch import nn

from attnpatch.activation.files import Folder
from attnpatch.blocks.spec import Blocks
from attnpatch.capturing.capture import recorder_of
from attnpatch.errors import CaptureError
from attnpatch.maps.block_map import BlockMap
from attnpatch.observing import Observer
from attnpatch.oom import is_out_of_memory
from attnpatch.patching.patch import Patch
from attnpatch.recording.options import CaptureOptions
from attnpatch.recording.text.gathered import maps_of, nothing
from attnpatch.recording.text.observer import TextObserver
from attnpatch.recording.text.recorder import Recorder
from attnpatch.recording.text.sequences import reference


def _nothing() -> None:
    """Stands for a weak reference where there is no cache."""


class ThreadRecorder:
    """Writes one file per sequence. A sequence is one call, or one ``generate``: all calls that continue its cache.

    The file is written when the first call ends. If further calls continued the sequence, it is written again when the
    sequence ends. Only the current sequence is in memory. If capturing a sequence fails, it is left out and the script
    goes on.

    Args:
        patch: The patch of the model.
        kind: The model's class.
        folder: Where files are written.
        block_size: Tokens per block.
        failed: Called with the error of a sequence that could not be captured.
    """

    def __init__(
        self,
        patch: Patch,
        kind: type[nn.Module],
        folder: Folder,
        block_size: int,
        failed: Callable[[Exception], None],
    ) -> None:
        self.patch, self.kind, self.folder, self.failed = patch, kind, folder, failed
        self.block_size = block_size
        self._inner: Recorder | None = None
        self._sites = 0
        # Whether the current sequence is left out; and whether that was decided before the whole model was called.
        self.is_out = self._is_out_in_part = False
        self._number: tuple[int, int] | None = None
        self._is_dirty = False
        # The cache of the current call, and the cache of the sequence whose capture was given up.
        self._cache: Any = None
        self._given_up: Callable[[], Any] = _nothing
        self._is_inside = self._is_part = False
        self._raised: BaseException | None = None

    def begin_call(self, args: Any, kwargs: Any) -> None:
        """The model is about to be called."""
        self._is_inside, self._is_part, self._raised = True, False, sys.exc_info()[1]
        try:
            inner = self._recorder()
            call = inner.read_call(args, kwargs, None)
            goes_on = inner.goes_on(call) or (
                self.is_out and call.past > 0 and self._given_up() is call.cache
            )
            if not goes_on:
                if not inner.is_partial:
                    self.finish()
                if not self._is_out_in_part:
                    self.is_out = False
            self._is_out_in_part = False
            self._given_up = reference(call.cache) if self.is_out else _nothing
            inner.begin_call(args, kwargs)
            self._cache = call.cache
        except Exception as error:
            self.fail(error)

    def begin_part(self, kind: type, args: Any, kwargs: Any) -> None:
        """A part of the model is about to be called on its own."""
        self._is_inside, self._is_part, self._raised = True, True, sys.exc_info()[1]
        try:
            inner = self._recorder()
            if not inner.is_partial:
                self.finish()
                self.is_out = False
            inner.begin_part(kind, args, kwargs)
        except Exception as error:
            self.fail(error)

    def end_call(self) -> None:
        """The call has ended, or an exception has left it."""
        try:
            self._end_call()
        finally:
            self._is_inside, self._raised, self._cache = False, None, None

    def _end_call(self) -> None:
        if self._inner is None:
            return
        self._inner.end_call()
        if sys.exc_info()[1] is not self._raised:
            # The call failed, so the sums cover only a part of it. The script reports the error.
            self._drop()
        if not self.is_out:
            self._is_dirty = True
            # A part, such as an encoder, has run alone: its file is written together with the calls of the model that
            # follow.
            if not self._is_part and (self._number is None or self._number[0] != os.getpid()):
                self._write()

    def wants(self, name: str) -> bool:
        """Whether a site is captured now."""
        if self.is_out and not self._is_inside and not self._is_out_in_part:
            # A part is called after a failed call of the whole model: a new sequence begins.
            self.is_out = False
        if self.is_out:
            return False
        try:
            return self._recorder().wants(name)
        except Exception as error:
            self.fail(error)
            return False

    def observer(self, site: Any, args: Any, kwargs: Any) -> _Guarded | None:
        """The observer for a site's call that is about to be made; None if its capture was given up."""
        try:
            inner = self._recorder()
            if inner.call is None:
                last = inner.sequences[-1].calls if inner.sequences else None
                if last is None or any(site.name in calls for calls in last):
                    self.finish()
                    self.is_out = False
            self._is_dirty = True
            return _Guarded(self, inner.observer(site, args, kwargs))
        except Exception as error:
            self.fail(error)
            return None

    def fail(self, error: Exception) -> None:
        """Give up capturing the current sequence."""
        if not self.is_out:
            self._drop()
            self.failed(error)

    def finish(self) -> None:
        """The sequence has ended: write what was added since the last write, and free its sums."""
        if self._inner is None:
            return
        if self._is_dirty:
            self._write()
        self._inner.forget()
        self._number = None

    def _drop(self) -> None:
        self._given_up = reference(self._cache) if self._cache is not None else _nothing
        self.is_out, self._is_out_in_part = True, not self._is_inside
        self._is_dirty, self._number = False, None
        if self._inner is not None:
            self._inner.forget()

    def _recorder(self) -> Recorder:
        """The recorder, updated if the patch has gained sites."""
        if self._inner is None or self._sites != len(self.patch.sites):
            new = recorder_of(self.patch, self.kind, CaptureOptions(Blocks.fixed(self.block_size)))
            if self._inner is None:
                self._inner = new
            else:
                self._inner.places, self._inner.wanted = new.places, new.wanted
                self._inner.owners = new.owners
            self._sites = len(self.patch.sites)
        return self._inner

    @staticmethod
    def _maps(inner: Recorder) -> dict[str, BlockMap]:
        """The captured maps by group; if a module is called several times in one call, each time has its own map, with
        a number.
        """
        found: dict[str, BlockMap] = {}
        for calls in inner.captured():
            maps, _ = maps_of(inner, calls)
            for kind, one in maps.items():
                times = sum(key.partition(" (call ")[0] == kind for key in found)
                found[f"{kind} (call {times + 1})" if times else kind] = one
        if not found:
            raise (
                nothing(inner)
                if inner.left_out
                else CaptureError("the call ran no attention that attnpatch sees")
            )
        return found

    def _write(self) -> None:
        self._is_dirty = False
        assert self._inner is not None
        try:
            maps = self._maps(self._inner)
            is_new = self._number is None or self._number[0] != os.getpid()
            if is_new:
                # After a fork the number belongs to the parent process.
                self._number = (os.getpid(), self.folder.claim())
            assert self._number is not None
            try:
                self.folder.write(self._number[1], maps)
            finally:
                if is_new:
                    self.folder.release(self._number[1])
            self.folder.written += is_new
        except Exception as error:
            self.fail(error)


class _Guarded(Observer):
    """Wraps an observer: its errors end the capture of the sequence instead of the model's call."""

    def __init__(self, recorder: ThreadRecorder, observer: TextObserver) -> None:
        self.recorder = recorder
        # What each method returns once the capture was given up.
        otherwise = {"begin": False, "take": "given up"}
        for name in ("begin", "observe", "take", "restart", "end", "finish"):
            step = functools.partial(self._attempted, getattr(observer, name), otherwise.get(name))
            setattr(self, name, step)

    def _attempted(self, step: Callable[..., Any], otherwise: Any, *args: Any) -> Any:
        if self.recorder.is_out:
            return otherwise
        try:
            return step(*args)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            self.recorder.fail(error)
            return otherwise


class AutomaticRecorder:
    """Captures every call of an automatically patched model, with a separate recorder for each thread.

    Args:
        new: Makes the recorder of a thread.
    """

    gives_way = True
    is_of_gradient = False

    def __init__(self, new: Callable[[], ThreadRecorder]) -> None:
        self._new = new
        self._threads: dict[threading.Thread, ThreadRecorder] = {}
        # These methods are forwarded to the running thread's recorder.
        for name in ("begin_call", "begin_part", "end_call", "wants", "observer", "fail"):
            setattr(self, name, functools.partial(self._told, name))

    def is_mine(self) -> bool:
        """Always true, because this recorder captures the calls of every thread."""
        return True

    def _told(self, name: str, *args: Any) -> Any:
        thread = threading.current_thread()
        if thread not in self._threads:
            # A server may use one thread per request: write what the ended threads have captured.
            for ended in [each for each in list(self._threads) if not each.is_alive()]:
                self._threads.pop(ended).finish()
            self._threads[thread] = self._new()
        return getattr(self._threads[thread], name)(*args)

    def finish(self) -> None:
        """Write what was added to every thread's current sequence, and free the sums."""
        for recorder in list(self._threads.values()):
            recorder.finish()
