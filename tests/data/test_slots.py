import gc

import numpy as np
import torch

from mmtrain.data.slots import SharedMemory, SlotWriter


def test_what_is_written_into_a_slot_is_read_there_and_nowhere_else() -> None:
    memory = SharedMemory(5000)
    writer = SlotWriter(memory.descriptor, memory.slot_bytes)
    taken = [memory.take()]
    writer.slot(taken[0][0])
    taken += [memory.take() for _ in range(8)]  # more than there were when the writer looked first
    assert sorted(slot for slot, _ in taken) == list(range(9))
    for slot, _ in taken:
        writer.slot(slot)[:] = slot + 1
    for slot, array in taken:
        assert array.nbytes >= 5000 and (array == slot + 1).all()
    memory.close()
    assert all((array == slot + 1).all() for slot, array in taken)


def test_a_slot_is_taken_again_only_when_nothing_refers_to_it() -> None:
    memory = SharedMemory(4096)
    slot, array = memory.take()
    tensor = torch.from_numpy(np.frombuffer(array, np.int64, 4, 64).reshape(2, 2)[1:])[None]
    del array
    others = [memory.take() for _ in range(6)]
    assert slot not in [number for number, _ in others]
    tensor.fill_(7)
    part = tensor[0, 0, :1]
    del tensor
    gc.collect()
    assert memory.take()[0] != slot and part.item() == 7
    del part
    others.append(memory.take())
    assert others[-1][0] == slot
    held = {number for number, _ in others}
    others.clear()
    again = [memory.take() for _ in held]
    assert {number for number, _ in again} == held  # no slot is lost, and none is added while others are free
    memory.close()
