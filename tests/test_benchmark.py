from idloss.benchmark import LossCase, benchmark_loss, format_timings


def test_loss_table_covers_every_way_and_counts_the_work():
    case = LossCase("mobilefacenet", batch=2, crop=None, sr_size=(28, 28), hr_size=(112, 112))
    timings = {t.name: t for t in benchmark_loss(case, rounds=1)}
    assert len(timings) == 4
    bare, ours = timings["bare arithmetic"], timings["IdentityPreservedLoss"]
    cached = timings["loss, target_features"]
    assert ours.flops == bare.flops  # no network pass beyond the unavoidable ones
    assert cached.flops < ours.flops  # no HR forward
    assert all(t.seconds > 0 and 0 < t.share < 1.5 and t.mebibytes >= 0 for t in timings.values())
    table = format_timings(list(timings.values()))
    assert table.count("\n") == 5
    assert "peak MiB" in table
