"""Captures every call of an automatically patched model into files, and never stops the script."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from attnpatch.activation.files import Folder
from attnpatch.capture.blocks import Blocks
from attnpatch.capture.observer import SiteObserver
from attnpatch.capture.recorder import Recorder
from attnpatch.capturing import recorder_of
from attnpatch.errors import CaptureError
from attnpatch.patching.patch import Patch


class AutomaticRecorder:
    """Writes a file for every sequence: one call, or one ``generate`` with the calls that continue its cache.

    The file is written when the first call ends, and once more when a sequence that went on ends; only the sequence
    that is going on is held. Where anything fails, the sequence is left out and the script goes on.

    Args:
        patch: The patch of the model.
        kind: The model's class.
        folder: Where to.
        block_size: Tokens per block.
        failed: Called with the error of a sequence that is not captured.
    """

    gives_way = True
    is_of_gradient = False

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
        # Whether the sequence that is going on is left out, and whether that began before the whole model was called.
        self.is_out = self._is_out_in_part = False
        self._number: tuple[int, int] | None = None
        self._is_dirty = False
        self._thread: int | None = None
        self._raised: BaseException | None = None

    def begin_call(self, args: Any, kwargs: Any) -> None:
        """The model is called."""
        me = threading.get_ident()
        if self._thread not in (None, me):
            self.failed(RuntimeError("two threads call the model at once"))
            return
        self._thread, self._raised = me, sys.exc_info()[1]
        try:
            inner = self._recorder()
            goes_on = inner.goes_on(inner.read_call(args, kwargs, True))
            if not goes_on:
                if not inner.is_partial:
                    self.finish()
                if not self._is_out_in_part:
                    self.is_out = False
            self._is_out_in_part = False
            inner.begin_call(args, kwargs)
        except Exception as error:
            self.fail(error)

    def end_call(self) -> None:
        """The call has ended, or an exception has left it."""
        if self._thread != threading.get_ident():
            return
        try:
            self._end_call()
        finally:
            self._thread = self._raised = None

    def _end_call(self) -> None:
        if self._inner is None:
            return
        self._inner.end_call()
        if sys.exc_info()[1] is not self._raised:
            # What was summed until then is not the attention of a call; the error is the script's to report.
            self._drop()
        if not self.is_out:
            self._is_dirty = True
            if self._number is None or self._number[0] != os.getpid():
                self._write()

    def wants(self, name: str) -> bool:
        """Whether a site is captured now."""
        if self._thread not in (None, threading.get_ident()):
            return False
        if self.is_out and self._thread is None and not self._is_out_in_part:
            # A part is called after a whole call that failed: something new begins.
            self.is_out = False
        if self.is_out:
            return False
        try:
            return self._recorder().wants(name)
        except Exception as error:
            self.fail(error)
            return False

    def observer(self, site: Any, args: Any, kwargs: Any) -> _Guarded | None:
        """Who looks at the call of a site that is about to be made."""
        try:
            inner = self._recorder()
            if inner.call is None:
                if not inner.sequences or site.name in inner.sequences[-1]:
                    self.finish()
                    self.is_out = False
                self._is_dirty = True
            return _Guarded(self, inner.observer(site, args, kwargs))
        except Exception as error:
            self.fail(error)
            return None

    def fail(self, error: Exception) -> None:
        """Give the sequence that is going on up."""
        if not self.is_out:
            self._drop()
            self.failed(error)

    def finish(self) -> None:
        """The sequence has ended: write what was added since it was written, and forget it."""
        if self._inner is None:
            return
        if self._is_dirty:
            self._write()
        self._inner.sequences.clear()
        self._number = None

    def _drop(self) -> None:
        self.is_out, self._is_out_in_part = True, self._thread is None
        self._is_dirty, self._number = False, None
        if self._inner is not None:
            self._inner.sequences.clear()

    def _recorder(self) -> Recorder:
        """The recorder, which knows all sites that the patch has by now."""
        if self._inner is None or self._sites != len(self.patch.sites):
            new = recorder_of(self.patch, self.kind, Blocks.fixed(self.block_size))
            if self._inner is None:
                self._inner = new
            else:
                self._inner.places, self._inner.wanted = new.places, new.wanted
            self._sites = len(self.patch.sites)
        return self._inner

    def _write(self) -> None:
        self._is_dirty = False
        assert self._inner is not None
        try:
            if not any(self._inner.sequences):
                raise CaptureError("no attention was seen in it")
            maps = self._inner.maps()
            is_new = self._number is None or self._number[0] != os.getpid()
            if is_new:
                # After a fork the number is the parent's.
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


class _Guarded:
    """An observer whose errors end the capture of a sequence instead of the model's call."""

    is_of_gradient = False

    def __init__(self, recorder: AutomaticRecorder, observer: SiteObserver) -> None:
        self.recorder, self.observer = recorder, observer

    def observe(self, probabilities: Any, passing: Any) -> None:
        if not self.recorder.is_out:
            try:
                self.observer.observe(probabilities, passing)
            except Exception as error:
                self.recorder.fail(error)

    def take(self, call: dict[str, Any], lse: torch.Tensor, workspace: int | None) -> str | None:
        if self.recorder.is_out:
            return "given up"
        try:
            return self.observer.take(call, lse, workspace)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self.recorder.fail(error)
            return "given up"

    def rows(self, lead_count: int, q_len: int, kv_len: int) -> None:
        return None

    def finish(self) -> None:
        pass

    def restart(self) -> None:
        if not self.recorder.is_out:
            try:
                self.observer.restart()
            except Exception as error:
                self.recorder.fail(error)
