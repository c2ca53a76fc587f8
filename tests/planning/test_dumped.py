"""What a TPU's compiler writes down: whole or not at all, and with every buffer where it lies."""

from lcx.planning import dumped

BUFFERS = """BufferAssignment:
allocation 0: size 512, thread-local:
 value: <809 reduce_sum.676 @0> (size=512,offset=0): f32[]{:T(128)}
allocation 1: size 939524096, parameter 7, shape |f32[32,14336,512]| at ShapeIndex {}, maybe-live-out:
 value: <20976 param.222 @0> (size=939524096,offset=0): f32[32,14336,512]{2,1,0:T(8,128)}
allocation 2: size 3145728, parameter 40, shape |s32[1,786432]| at ShapeIndex {}:
allocation 3: size 4096, constant:
allocation 4: size 512, maybe-live-out:
allocation 5: size 104689827840, color 5, preallocated-temp:
allocation 6: size 80, color 2, preallocated-temp:
allocation 7: size 81977344224, preallocated-temp:
allocation 8: size 67043328, color 1, preallocated-temp:
"""


def write(folder, *endings, program="jit__train"):
    folder.mkdir(exist_ok=True)
    for ending in endings:
        (folder / f"module_0000.{program}.cl_1.after_optimizations{ending}").write_text(f"{ending} of {program}")


def test_buffers_are_added_up_by_where_they_lie():
    found = dumped.memory(BUFFERS)
    assert found["arguments"] == 939524096 + 3145728
    assert found["peak"] == found["arguments"] + found["temporary"]
    assert found["temporary"] == 512 + 4096 + 512 + 81977344224
    assert found["host_temporary"] == 104689827840
    assert set(dumped.memory("").values()) == {0}


def test_nothing_is_read_before_all_is_written(tmp_path):
    folder = tmp_path / "dump"
    assert dumped.written(folder, "jit__train") is None
    write(folder, ".txt", "-buffer-assignment.txt", "-buffer-assignment-values.txt")
    assert dumped.written(folder, "jit__train") is None
    write(folder, ".txt", "-buffer-assignment.txt", "-memory-usage-report.txt", program="jit_other")
    assert dumped.written(folder, "jit__train") is None
    write(folder, "-memory-usage-report.txt")
    assert dumped.written(folder, "jit__train") == (".txt of jit__train", "-buffer-assignment.txt of jit__train")
