"""The gate for compiled code: what it lets through, what it must not, and how it reads machine code."""

from dataclasses import asdict, replace
from importlib.metadata import version

import known_bad
import pytest
from ldm_kernels import compiling
from ldm_kernels.compiling import GPUS, Compiled, busiest_loop, complaints, count, parse_code, programs_at_once

SASS = """
        code for sm_80
                Function : kernel
        .headerflags    @"EF_CUDA_TEXMODE_UNIFIED EF_CUDA_64BIT_ADDRESS EF_CUDA_SM80"
        /*0000*/                   MOV R1, c[0x0][0x28] ;            /* 0x00000a0000017a02 */
                                                                     /* 0x000fe40000000f00 */
        /*0010*/                   LDG.E.128 R4, [R2.64] ;           /* 0x0000000402047981 */
        /*0020*/                   LDGSTS.E.BYPASS.128 [R3], [R8.64] ;
        /*0030*/                   HMMA.16816.F32 R4, R4, R6, RZ ;
        /*0040*/             @!P0  BRA 0x20 ;
        /*0050*/                   FADD R1, R1, R2 ;
        /*0060*/                   FADD R1, R1, R2 ;
        /*0070*/                   FADD R1, R1, R2 ;
        /*0080*/             @P1   BRA `(.L_x_2) 0x50 ;
        /*0090*/                   EXIT ;
        /*00a0*/                   BRA 0xa0;
"""

FINE = Compiled(
    name="fine",
    capability=80,
    registers=128,
    spilled_bytes=0,
    local_accesses=0,
    shared_bytes=32768,
    programs=4,
    tensor_instructions=64,
    narrow_loads=0,
    wide_loads=4,
    wide_copies=8,
    serialized=False,
    loop_instructions=400,
    useful_ratio=1.1,
    most_useful_ratio=1.1,
    pipelined=True,
)


def test_machine_code_is_read_with_and_without_predicates():
    code = parse_code(SASS)
    assert [address for address, _ in code] == list(range(0, 0xB0, 0x10))
    assert code[4] == (0x40, "BRA 0x20")
    assert (count(code, "HMMA"), count(code, r"LDGSTS.*\.128"), count(code, r"LDG\.E.*\.128")) == (1, 1, 1)


def test_the_busiest_loop_is_the_one_with_the_matrix_products():
    assert busiest_loop(parse_code(SASS)) == 3  # 0x20 .. 0x40, though 0x50 .. 0x80 is longer
    assert busiest_loop(parse_code(SASS.replace("HMMA", "FFMA"))) == 4
    assert busiest_loop([(0, "MOV R1, R2"), (16, "EXIT"), (32, "BRA 0x20")]) == 3  # nothing goes round: all of it


@pytest.mark.parametrize(
    ("capability", "registers", "threads", "shared_kib", "programs"),
    [
        (80, 255, 128, 40, 2),  # 256 registers x 32 a warp: two programs of four warps are all 65536
        (80, 128, 128, 40, 4),  # now shared memory: 4 x (40 + 1) = 164
        (86, 32, 128, 0, 12),  # 1536 threads
        (90, 16, 32, 0, 32),  # no more than 32 programs
        (89, 255, 128, 99, 1),
    ],
)
def test_how_many_programs_share_a_multiprocessor(capability, registers, threads, shared_kib, programs):
    assert programs_at_once(GPUS[capability], registers, threads, 1024 * shared_kib) == programs


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"spilled_bytes": 8}, "spills 8 bytes"),
        ({"local_accesses": 1}, "spills"),
        ({"shared_bytes": 164 * 1024}, "takes 164 KiB of shared memory"),
        ({"capability": 86, "shared_bytes": 100 * 1024}, "takes 100 KiB"),
        ({"programs": 0}, "does not fit a multiprocessor"),
        ({"narrow_loads": 3}, "loads 2 bytes at a time, 3 times"),
        ({"wide_loads": 0, "wide_copies": 0, "pipelined": False}, "loads nothing 16 bytes wide"),
        ({"serialized": True}, "wait for each other"),
        ({"tensor_instructions": 0}, "no tensor-core instruction"),
        ({"wide_copies": 0}, "no load runs ahead"),
        ({"useful_ratio": 1.6}, "executes 1.60 times what is useful, at most 1.10 allowed"),
    ],
)
def test_each_bound_can_be_broken(change, complaint):
    assert complaints(FINE) == []
    (found,) = complaints(replace(FINE, **change))
    assert complaint in found


def test_five_per_cent_worse_than_recorded_is_refused():
    assert compiling.regressions([replace(FINE, loop_instructions=420)], [FINE]) == []
    assert compiling.regressions([replace(FINE, loop_instructions=421)], [FINE]) == [
        "fine sm_80: loop_instructions 400 -> 421"
    ]
    assert compiling.regressions([replace(FINE, programs=3)], [FINE]) == ["fine sm_80: programs 4 -> 3"]
    assert "not recorded" in compiling.regressions([replace(FINE, capability=90)], [FINE])[0]


def test_a_record_is_read_as_it_was_written_and_of_the_same_compiler(tmp_path):
    compiling.record([FINE, replace(FINE, useful_ratio=None)], tmp_path)
    rows = compiling.recorded(tmp_path, by=version("triton"))
    assert [asdict(row) for row in rows] == [asdict(FINE), asdict(replace(FINE, useful_ratio=None))]
    (written,) = tmp_path.iterdir()
    (tmp_path / "compiled-3.10.json").write_text(written.read_text().replace("fine", "newer"))
    assert compiling.recorded(tmp_path)[0].name == "newer"  # 3.10 is newer than 3.8
    assert compiling.recorded(tmp_path, by="3.10.2")[0].name == "newer"
    assert compiling.recorded(tmp_path, by=version("triton"))[0].name == "fine"
    assert compiling.recorded(tmp_path, by="1.0.0") == []


@pytest.mark.parametrize("triton", ["3.6.0", "3.8.0"])
def test_what_is_recorded_is_within_bounds(triton):
    """At both ends of what pyproject allows."""
    rows = compiling.recorded(by=triton)
    assert len({(row.name, row.capability) for row in rows}) == len(rows) > 100
    assert [line for row in rows for line in complaints(row)] == []


def test_a_good_configuration_passes_and_known_bad_ones_are_rejected():
    (good,) = compiling.compile_all(known_bad.good, lambda name, capability: capability == 80, processes=1)
    assert complaints(good) == []
    bad = compiling.compile_all(known_bad.bad, lambda name, capability: capability == 80, processes=1)
    strides, padded = ("; ".join(complaints(c)) for c in bad)
    assert "loads 2 bytes at a time" in strides
    assert "no load runs ahead" in strides
    assert "spills" in padded
    assert "executes 1.60 times what is useful" in padded


@pytest.mark.slow
def test_every_shipped_configuration_is_within_bounds_and_as_good_as_recorded():
    rows = compiling.compile_all()
    wrong = [line for row in rows for line in complaints(row)]
    if before := compiling.recorded(by=version("triton")):
        wrong += compiling.regressions(rows, before)
        assert {(row.name, row.capability) for row in before} == {(row.name, row.capability) for row in rows}
    assert wrong == []
