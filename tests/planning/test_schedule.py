"""Transfers as they stand in a compiled program's text."""

from lcx.planning.schedule import Collective, computations, read_schedule

MESH = {"data": 1, "fsdp": 2, "expert": 1, "tensor": 1, "ring": 4, "ulysses": 1}

# A loop of 7 hops in a loop of 32 layers: one transfer starts before a kernel and is awaited after it, another is not.
TEXT = """HloModule jit__train, is_scheduled=true

%hop (p: (s32[], bf16[1,64,8,128])) -> (s32[], bf16[1,64,8,128]) {
  %p = (s32[]{:T(128)}, bf16[1,64,8,128]{3,2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %k = bf16[1,64,8,128]{3,2,1,0} get-tuple-element(%p), index=1
  %send = (bf16[1,64,8,128]{3,2,1,0}, bf16[1,64,8,128]{3,2,1,0}, u32[], u32[]) collective-permute-start(%k), channel_id=1, \
source_target_pairs={{0,1},{1,2},{2,3},{3,0},{4,5},{5,6},{6,7},{7,4}}, metadata={op_name="jit(_train)/attention/shard_map"}
  %o = f32[64]{0} custom-call(%k), custom_call_target="tpu_custom_call"
  %sent = bf16[1,64,8,128]{3,2,1,0} collective-permute-done(%send)
  ROOT %t = (s32[], bf16[1,64,8,128]{3,2,1,0}) tuple(%next, %sent)
}

%more (p: (s32[], bf16[1,64,8,128])) -> pred[] {
  %p = (s32[], bf16[1,64,8,128]{3,2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(7)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%layer (p: (s32[], bf16[1,64,8,128])) -> (s32[], bf16[1,64,8,128]) {
  %p = (s32[], bf16[1,64,8,128]{3,2,1,0}) parameter(0)
  %w = bf16[16,32]{1,0} constant({...})
  %g = bf16[32,32]{1,0} all-gather(%w), replica_groups=mesh['a'=2,'b'=4] {'a'}, metadata={op_name="jit(_train)/mlp/dot"}
  %s = f32[8]{0} all-reduce(%w), replica_groups=[2,4]<=[8], to_apply=%sum, metadata={op_name="jit(_train)/loss/sum"}
  ROOT %h = (s32[], bf16[1,64,8,128]{3,2,1,0}) while(%p), condition=%more, body=%hop
}

ENTRY %main (a: bf16[1,64,8,128]) -> bf16[1,64,8,128] {
  %a = bf16[1,64,8,128]{3,2,1,0} parameter(0)
  %t = (s32[], bf16[1,64,8,128]{3,2,1,0}) tuple(%a)
  %all = (s32[], bf16[1,64,8,128]{3,2,1,0}) while(%t), condition=%c, body=%layer, backend_config={"known_trip_count":{"n":"32"}}
  %alone = f32[4]{0} all-reduce(%a), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%sum
  ROOT %r = bf16[1,64,8,128]{3,2,1,0} get-tuple-element(%all), index=1
}
"""


def test_transfers_are_counted_with_their_loops_axes_and_hiding():
    found = read_schedule(TEXT, MESH)
    assert found == [
        Collective("collective-permute", ("ring",), 64 * 8 * 128 * 2, 7 * 32, True, "attention"),
        Collective("all-gather", ("fsdp",), 32 * 32 * 2, 32, False, "mlp"),
        # Its operand is larger than its result.
        Collective("all-reduce", ("ring",), 16 * 32 * 2, 32, False, "loss"),
    ]
    assert found[0].bytes == 7 * 32 * 131072


def test_a_transfer_that_nothing_is_computed_behind_is_not_hidden():
    swapped = TEXT.replace('custom_call_target="tpu_custom_call"', 'custom_call_target="other"')
    assert not read_schedule(swapped, MESH)[0].hidden


def test_an_empty_program_sends_nothing():
    assert computations("") == ({}, "") and read_schedule("", MESH) == []


FUSED = """HloModule jit__train, is_scheduled=true

%gathered_product (x: bf16[64,32], w: bf16[4,32]) -> bf16[64,16] {
  %x = bf16[64,32]{1,0} parameter(0)
  %w = bf16[4,32]{1,0} parameter(1)
  %g = bf16[16,32]{1,0} all-gather(%w), replica_groups=mesh['a'=2,'b'=4] {'b'}
  ROOT %y = bf16[64,16]{1,0} convolution(%x, %g), dim_labels=bf_io->bf
}

ENTRY %main (x: bf16[64,32], w: bf16[4,32]) -> bf16[64,16] {
  %x = bf16[64,32]{1,0} parameter(0)
  %w = bf16[4,32]{1,0} parameter(1)
  ROOT %f = bf16[64,16]{1,0} fusion(%x, %w), kind=kOutput, calls=%gathered_product, metadata={op_name="jit(_train)/mlp/dot"}
}
"""


def test_a_transfer_fused_with_a_product_is_hidden_and_has_its_own_size():
    assert read_schedule(FUSED, MESH) == [Collective("all-gather", ("ring",), 16 * 32 * 2, 1, True, "mlp")]
