import html
import io
import json
import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from cosr_jax.config import RunConfig, to_dict
from cosr_jax.run.metrics import (
    JsonLinesLog,
    MetricsHistory,
    MetricsWriter,
    SampleLog,
    SampleRow,
    deterministic,
    overlap,
    sample_rows,
)
from cosr_jax.types import Completion, Outcome, RolloutGroup, Task, UserError, Verdict


def read_events(folder):
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0, "images": 0})
    return events.Reload()


def shown(events):
    """The last table of samples as TensorBoard renders it: (HTML, texts of its cells)."""
    tensor = events.Tensors("completions/samples/text_summary")[-1].tensor_proto
    page = markdown_to_safe_html(tensor.string_val[0])
    cells = re.findall(r"<td>(.*?)</td>", page, flags=re.DOTALL)
    return page, [html.unescape(cell.replace("<br>", "\n")) for cell in cells]


def group(answer="7", texts=("7", "8"), error=False):
    task = Task("math", "addition", 0.25, "3 + 4 = ?", answer, f"addition:{answer}")
    verdicts = [
        Verdict(Outcome.PASS, 1.0, "", text, "boxed", True)
        if text == answer
        else Verdict(Outcome.FAIL, 0.0, "wrong_answer", text, "boxed", False)
        for text in texts
    ]
    if error:
        verdicts[0] = Verdict(Outcome.ERROR, 0.5, detail="worker died")
    completions = tuple(Completion((1, 2), (-0.1, -0.2), text, "stop") for text in texts)
    return RolloutGroup(task, (1,), completions, tuple(verdicts))


def test_scalars_come_back_with_their_steps(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.scalars(1, {"train/loss": 0.5, "reward/frac_reward_zero_std": np.float32(0.25)})
        writer.scalars(2, {"train/loss": 0.25, "train/kl": None, "eval/score": math.nan})
    events = read_events(tmp_path)
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 0.5), (2, 0.25)]
    assert events.Scalars("reward/frac_reward_zero_std")[0].value == 0.25
    assert math.isnan(events.Scalars("eval/score")[0].value)
    assert "train/kl" not in events.Tags()["scalars"]


@pytest.mark.parametrize("tag", ["loss", "trian/loss", "train/", ""])
def test_a_metric_outside_the_namespaces_is_refused(tmp_path, tag):
    with MetricsWriter(tmp_path) as writer, pytest.raises(ValueError, match="is in none of"):
        writer.scalars(1, {tag: 1.0})


def test_flush_leaves_everything_readable_while_the_run_goes_on(tmp_path):
    writer = MetricsWriter(tmp_path)
    for step in range(50):
        writer.scalars(step, {"train/loss": float(step)})
    writer.flush()
    assert len(read_events(tmp_path).Scalars("train/loss")) == 50
    writer.close()
    writer.close()


def test_resuming_hides_the_events_after_the_checkpoint(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in (1, 2, 3, 4):
            writer.scalars(step, {"train/loss": float(step)})
            writer.text_samples(step, [SampleRow("q", f"first life {step}", "pass", "")])
    with MetricsWriter(tmp_path, start_step=2) as writer:  # in the same second: a file of its own
        writer.scalars(3, {"train/loss": 30.0})
        writer.text_samples(3, [SampleRow("q", "second life", "pass", "")])
    events = read_events(tmp_path)
    losses = [(e.step, e.value) for e in events.Scalars("train/loss")]
    assert losses == [(1, 1.0), (2, 2.0), (3, 30.0)]
    # What TensorBoard itself serves from; the accumulator above never purges texts.
    served = plugin_event_accumulator.EventAccumulator(str(tmp_path))
    texts = served.Reload().Tensors("completions/samples/text_summary")
    lives = [re.search(rb"\w+ life( \d)?", text.tensor_proto.string_val[0])[0] for text in texts]
    assert lives == [b"first life 1", b"first life 2", b"second life"]


def test_samples_are_shown_as_they_are(tmp_path):
    completion = "a|b <script>alert(1)</script>\n# no_heading\n\\boxed{7} **x** `y` [z](w) &amp;"
    with MetricsWriter(tmp_path) as writer:
        writer.text_samples(1, [SampleRow("3 + 4?", completion, "pass", "boxed")], "review: 3 < 4")
    page, cells = shown(read_events(tmp_path))
    assert cells == ["3 + 4?", completion, "pass", "boxed"]
    assert "<script" not in page
    assert "<strong>Curator:</strong> review: 3 < 4" in html.unescape(page)


@given(st.lists(st.text(max_size=40), min_size=4, max_size=4))
def test_no_text_breaks_the_table(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("events")
    with MetricsWriter(folder) as writer:
        writer.text_samples(1, [SampleRow(*texts)])
    page, cells = shown(read_events(folder))
    assert (page.count("<th>"), len(cells), page.count("<tr>")) == (4, 4, 2)
    for cell, text in zip(cells, texts, strict=True):
        if text.isprintable():
            assert cell.split() == text.split()
        else:
            assert all(c.isprintable() or c == "\n" for c in cell)


def test_long_samples_are_cut_and_say_so(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.text_samples(1, [SampleRow("q", "x" * 5000, "fail", "")])
    _, cells = shown(read_events(tmp_path))
    assert cells[1] == "x" * 1500 + " ... (3500 more characters)"


def test_figures_are_images(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.mastery_heatmap(4, {"addition/1": 1.0, "addition/2": 0.25, "sorting/3": 0.0})
        writer.learning_curves(4, {"validation": [(0, 0.1), (4, 0.5)], "none yet": []})
    events = read_events(tmp_path)
    for tag in ("curriculum/mastery", "eval/learning_curves"):
        image = events.Images(tag)[0]
        assert image.encoded_image_string.startswith(b"\x89PNG")
        pixels = decode(image.encoded_image_string)
        assert pixels.shape == (image.height, image.width, 3)
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20


def test_the_heat_map_shows_its_rates(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step, rate in enumerate((0.0, 1.0)):
            writer.mastery_heatmap(step, {"addition/1": rate})
    images = read_events(tmp_path).Images("curriculum/mastery")
    dark, bright = (decode(image.encoded_image_string) for image in images)
    assert dark.shape == bright.shape
    row, column = dark.shape[0] // 3, dark.shape[1] // 2  # inside the one cell
    np.testing.assert_array_equal(dark[row, column], (68, 1, 84))  # ends of viridis
    np.testing.assert_array_equal(bright[row, column], (253, 231, 36))


def decode(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def hparams_content(events, name):
    content = events.SummaryMetadata(f"_hparams_/{name}").plugin_data.content
    return plugin_data_pb2.HParamsPluginData.FromString(content)


def test_hparams_are_in_the_same_run(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.hparams(to_dict(RunConfig()), ["eval/validation"])
        writer.scalars(4, {"eval/validation": 0.75})
        writer.flush()
        assert "_hparams_/session_end_info" not in read_events(tmp_path).Tags()["tensors"]
        writer.finish()
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    events = read_events(tmp_path)
    start = hparams_content(events, "session_start_info").session_start_info
    assert start.hparams["train.learning_rate"].number_value == 2e-4
    assert start.hparams["grpo.scale_advantages"].bool_value is True
    assert start.hparams["rollout.engine"].string_value == "jax"
    assert start.hparams["eval.test"].string_value == '["test=*:20"]'
    experiment = hparams_content(events, "experiment").experiment
    assert [metric.name.tag for metric in experiment.metric_infos] == ["eval/validation"]
    end = hparams_content(events, "session_end_info").session_end_info
    assert end.status == 1  # STATUS_SUCCESS


def test_finish_belongs_to_hparams(tmp_path):
    with MetricsWriter(tmp_path) as writer, pytest.raises(ValueError, match="before hparams"):
        writer.finish()


def test_what_was_hidden_is_what_nobody_waited_for():
    found = overlap("judge", busy_s=4.0, waited_s=1.0)
    assert found == {"judge_s": 1.0, "judge_busy_s": 4.0, "judge_hidden": 0.75}
    assert overlap("judge", 1.0, 1.25)["judge_hidden"] == 0.0  # waiting ends a moment later
    assert overlap("judge", 0.0, 0.0) == {}


def test_the_overview_page_has_its_layout(tmp_path):
    MetricsWriter(tmp_path).close()
    tensor = read_events(tmp_path).Tensors("custom_scalars__config__")[0].tensor_proto
    layout = layout_pb2.Layout.FromString(tensor.string_val[0])
    charts = {chart.title: list(chart.multiline.tag) for chart in layout.category[0].chart}
    assert layout.category[0].title == "overview"
    assert charts["groups without signal"] == ["reward/frac_reward_zero_std$"]
    assert all(len(tags) >= 1 for tags in charts.values())


def test_sample_rows_spread_over_groups_and_samples():
    groups = [group(str(answer), (str(answer), "0")) for answer in range(1, 9)]
    rows = sample_rows(groups, 4)
    assert [row.reason.split("expected ")[1] for row in rows] == ["'1'", "'3'", "'5'", "'7'"]
    assert [row.verdict for row in rows] == ["pass", "fail", "pass", "fail"]
    assert rows[1].reason == "wrong_answer; answer '0', expected '3'"
    assert len(sample_rows(groups, 100)) == 8
    assert sample_rows([], 4) == sample_rows(groups, 0) == []


def test_history_keeps_floats_to_the_last_bit(tmp_path):
    values = [0.1, 1 / 3, 1e-300, float(np.float32(0.1)), -0.0]
    history = MetricsHistory(tmp_path / "metrics.jsonl")
    for step, value in enumerate(values):
        history.record(step, {"train/loss": value})
    restored = [row["train/loss"] for row in history.rows()]
    assert [value.hex() for value in restored] == [value.hex() for value in values]
    history.close()


def test_history_takes_array_scalars_and_writes_strict_json(tmp_path):
    history = MetricsHistory(tmp_path / "metrics.jsonl")
    history.record(
        1,
        {"train/a": np.float32(0.5), "train/b": math.nan, "train/c": np.int64(3), "train/d": None},
    )
    history.close()

    def refuse(constant):
        raise AssertionError(constant)

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line == {"step": 1, "train/a": 0.5, "train/b": None, "train/c": 3.0, "train/d": None}


def test_curves_and_the_deterministic_part(tmp_path):
    history = MetricsHistory(tmp_path / "metrics.jsonl")
    history.record(1, {"train/loss": 2.0, "perf/step_seconds": 0.7})
    history.record(2, {"eval/validation": 0.5})
    history.record(3, {"train/loss": 1.0})
    assert history.curve("train/loss") == [(1, 2.0), (3, 1.0)]
    assert deterministic(history.rows()[0]) == {"step": 1, "train/loss": 2.0}
    history.close()


@given(kept=st.integers(0, 6), lost=st.integers(0, 4), torn=st.binary(max_size=9))
def test_a_resumed_log_is_as_if_never_interrupted(tmp_path_factory, kept, lost, torn):
    path = tmp_path_factory.mktemp("log") / "rows.jsonl"
    unbroken = [{"step": i, "text": "ä\n" * i} for i in range(kept + lost)]
    log = JsonLinesLog(path)
    for i, row in enumerate(unbroken):
        log.append(row)
        if i == kept - 1:
            assert log.sync() == kept
    log.close()
    with path.open("ab") as file:
        file.write(torn)  # what a kill in the middle of a line leaves
    log = JsonLinesLog(path, keep_rows=kept)
    assert log.rows() == unbroken[:kept]
    for row in unbroken[kept:]:
        log.append(row)
    assert log.rows() == unbroken
    assert log.sync() == kept + lost
    log.close()


def test_synced_rows_are_on_the_disk_before_close(tmp_path):
    log = JsonLinesLog(tmp_path / "rows.jsonl")
    log.append({"a": 1})
    log.sync()
    assert (tmp_path / "rows.jsonl").read_text() == '{"a": 1}\n'
    log.close()


def test_a_log_shorter_than_its_checkpoint_is_named_and_left_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step"')
    with pytest.raises(UserError, match=r"metrics\.jsonl has 1 rows .* counted 2; restore"):
        MetricsHistory(path, keep_rows=2)
    assert path.read_text() == '{"step": 1}\n{"step"'


def test_sample_log_has_every_completion_with_its_provenance(tmp_path):
    log = SampleLog(tmp_path / "samples" / "train.jsonl")
    log.record(5, 2, [group(), group("9", ("9", "1"), error=True)], provenance="extractor 1")
    rows = log.rows()
    log.close()
    assert log.num_rows == len(rows) == 4
    assert rows[0] == {
        "step": 5,
        "round": 2,
        "task_id": group().task.task_id,
        "cell": "addition/2",
        "prompt": "3 + 4 = ?",
        "completion": "7",
        "finish_reason": "stop",
        "outcome": "pass",
        "reward": 1.0,
        "category": "",
        "answer": "7",
        "method": "boxed",
        "value_correct": True,
        "detail": "",
        "is_subjective": False,
        "unanswered": 0,
        "is_left_out": False,
        "task": group().task.to_dict(),
        "provenance": "math judge, extractor 1",
    }
    assert (rows[1]["outcome"], rows[1]["category"]) == ("fail", "wrong_answer")
    assert (rows[2]["outcome"], rows[2]["reward"]) == ("error", None)  # no verdict is no 0
