import torch

from minigpt2.bench.attention import bench_attention, bench_decode


def test_the_table_has_a_row_for_each_case(capsys):
    tiny = {"n_head": 2, "head_dim": 16, "repeats": 2, "least_seconds": 0.0}
    rows = bench_attention([(1, 32)], dropouts=(0.0, 0.5), decode_shapes=[], **tiny)
    assert [(r.dropout_p, r.backward) for r in rows] == [(0.0, False), (0.0, True), (0.5, False), (0.5, True)]
    assert all(r.rate > 0 and r.ratio_range[0] <= r.ratio <= r.ratio_range[1] and r.share_of_mm > 0 for r in rows)
    assert capsys.readouterr().out.count("B1 T32") == 4
    assert len(bench_decode([(1, 8)], n_head=2, head_dim=16, repeats=2, least_seconds=0.0)) == 1


def test_the_head_names_machine_versions_and_command(capsys):
    bench_attention([], decode_shapes=[])
    out = capsys.readouterr().out
    assert out.startswith("bench attention: ")
    assert f"torch {torch.__version__}" in out
    assert f"{torch.get_num_threads()} threads" in out
    assert "command: " in out
