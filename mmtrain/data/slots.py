"""Memory that a training process and its decoding processes share: packs are written once and never copied.

The memory has no name anywhere: it is gone with the last process that holds it, whatever ends that.
"""

import mmap
import os
import threading
import weakref

import numpy as np


class SharedMemory:
    """Slots of equal size: four, and twice as many as before whenever all are in use.

    A page is real from its first use on, and then stays: fresh pages cost more time than decoding into them leaves.
    """

    def __init__(self, slot_bytes: int) -> None:
        """No slot yet."""
        self.slot_bytes = -(-slot_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        """Bytes of a slot."""
        self.descriptor = os.memfd_create("packs")
        """Open file, for the processes that write into slots."""
        self._slots = 0
        self._free: list[int] = []
        self._lock = threading.Lock()

    def take(self) -> tuple[int, np.ndarray]:
        """Number and memory (uint8) of a slot, free again when no array or tensor refers to that memory any more.

        OSError: the machine has no room for more slots.
        """
        with self._lock:
            if not self._free:
                added = range(self._slots, max(4, 2 * self._slots))
                os.ftruncate(self.descriptor, added.stop * self.slot_bytes)
                self._map = mmap.mmap(self.descriptor, added.stop * self.slot_bytes)
                self._slots = added.stop
                self._free.extend(reversed(added))  # the list stays: finalizers hold it
            slot = self._free.pop()
        memory = np.frombuffer(self._map, np.uint8, self.slot_bytes, slot * self.slot_bytes)
        weakref.finalize(memory, self._free.append, slot).atexit = False
        return slot, memory

    def close(self) -> None:
        """Memory that is referred to stays as long as it is."""
        os.close(self.descriptor)


class SlotWriter:
    """The same slots as a decoding process sees them."""

    def __init__(self, descriptor: int, slot_bytes: int) -> None:
        """`descriptor`: an open file of SharedMemory."""
        self._descriptor, self._slot_bytes = descriptor, slot_bytes
        self._map = None

    def slot(self, number: int) -> np.ndarray:
        """Memory of a slot."""
        end = (number + 1) * self._slot_bytes
        if self._map is None or len(self._map) < end:
            self._map = mmap.mmap(self._descriptor, os.fstat(self._descriptor).st_size)
        return np.frombuffer(self._map, np.uint8, self._slot_bytes, number * self._slot_bytes)
