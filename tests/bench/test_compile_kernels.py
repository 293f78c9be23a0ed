"""The counts that bench.compile_kernels makes of an assembly, and when it says that a kernel got worse."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="what it compiles with")

from bench import compile_kernels
from fastrlhf_kernels.gpu import tuning

SASS = """
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   MOV R1, R2 ;
        /*0020*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8] ;
        /*0030*/               @P0 BRA 0x20 ;
        /*0040*/                   MUFU.EX2 R3, R4 ;
        /*0050*/               @P1 BRA 0x10 ;
        /*0060*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0070*/                   STG.E.U16 desc[UR4][R2.64+0x10], R4 ;
        /*0080*/                   EXIT ;
        /*0090*/                   BRA 0x90;
        /*00a0*/                   NOP;
"""


def test_instructions_outside_the_innermost_loop_of_products():
    """The loop over the vocabulary has the loop over the depth in it, and its softmax counts."""
    assert compile_kernels.outside_products(SASS) == 8  # 11, without the product, its jump and the NOP
    assert compile_kernels.outside_products(SASS.replace("HGMMA", "FFMA")) == 10
    wait = SASS.replace("MOV R1, R2", "HGMMA R1, R2").replace("BRA 0x20", "BRA 0x0").replace("BRA 0x90", "BRA 0x10")
    assert compile_kernels.outside_products(wait) == 6  # the jump from behind the end is no loop around the product


def test_blocks_of_a_multiprocessor():
    chip = tuning.CHIPS["sm_90"]
    assert compile_kernels.resident(chip, 128, 98328, 8) == 2  # registers and shared memory both hold two
    assert compile_kernels.resident(chip, 129, 98328, 8) == 1
    assert compile_kernels.resident(chip, 32, 150_000, 4) == 1
    assert compile_kernels.resident(chip, 16, 0, 1) == 32


def test_what_got_worse_by_more_than_a_tenth_is_named():
    record = {"_f sm_90 1": {"stg": 16.0, "ctas": 2, "per_logit": 20.0}}
    row = {"name": "_f sm_90 1", "target": "sm_90", "stg": 16.0, "ctas": 2, "per_logit": 22.0}
    assert compile_kernels.worse(row, record) == ""
    assert compile_kernels.worse(row | {"stg": 2.0}, record) == "stores of 2.0 bytes, 16.0 recorded"
    assert compile_kernels.worse(row | {"ctas": 1}, record) == "1 blocks a multiprocessor, 2 recorded"
    assert compile_kernels.worse(row | {"per_logit": 22.1}, record) == "22.1 instructions a logit, 20.0 recorded"
    assert "--record" in compile_kernels.worse(row | {"name": "_f sm_90 2"}, record)
    assert compile_kernels.worse(row | {"name": "_f sm_80 1", "target": "sm_80"}, record) == ""
