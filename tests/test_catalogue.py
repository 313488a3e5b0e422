"""What is said of models, on the page of the zoo and in tables."""

import re
import shutil

import pytest
import torch
from conftest import ROOT
from nets import faces
from timm.models import generate_default_cfgs, save_for_hf
from torch import nn

from idloss import catalogue, create_fnet, create_srnet, list_fnets, list_srnets, register_fnet
from idloss.catalogue import describe_model, find_models
from idloss.evaluation import HR, Cell, Results
from idloss.evaluation.statistics import Estimate
from idloss.weights import sources

default_cfgs = generate_default_cfgs(
    {"shown_fnet.theirs": {"url": "https://localhost/x.pth", "license": "bsd-3-clause"}}
)


class NeedsValues(nn.Module):
    """A network of a plug-in that cannot be run on shapes alone."""

    num_features, num_classes = 4, 0
    pretrained_cfg = {  # noqa: RUF012
        "architecture": "shown_fnet",
        "input_size": (3, 12, 10),
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
    }

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(7))

    def forward(self, x):
        return x.flatten(1)[:, :4] * float(x.mean())


@register_fnet(crop="sphereface")
def shown_fnet(pretrained=False, **kwargs):
    return NeedsValues()


def test_a_network_of_a_plugin_whose_weights_timm_loads():
    (facts,) = find_models("shown_fnet")
    assert (facts.name, facts.licence) == ("shown_fnet.theirs", "bsd-3-clause")
    assert (facts.parameters, facts.multiply_adds) == (7, None)
    assert (facts.input, facts.crop) == ((12, 10), "sphereface")
    assert "shown_fnet" not in catalogue.markdown()


@pytest.fixture
def zoo(tmp_path, monkeypatch):
    """A zoo of its own, with the package's two models."""
    shutil.copytree(ROOT / "zoo", tmp_path / "zoo")
    for module in (sources, catalogue):
        monkeypatch.setattr(module, "zoo_folder", lambda: tmp_path / "zoo")
    monkeypatch.setattr("idloss.create.zoo_folder", lambda: tmp_path / "zoo")
    catalogue._measure.cache_clear()
    yield tmp_path / "zoo"
    catalogue._measure.cache_clear()


def test_the_page_of_the_zoo_is_not_stale():
    written = (ROOT / "zoo" / "README.md").read_text("utf-8")
    assert written == catalogue.markdown(), "run: idloss list --markdown > zoo/README.md"


def test_the_papers_tables_stand_beside_ours():
    page = catalogue.markdown()
    assert "lambda 0.5 | **84.03** | **94.73** (**95.10**) | **98.85** |" in page
    assert "lambda 0.5 | **14.91** | 63.34     | 63.78     | **71.96** |" in page
    assert "± nan" not in page, "a spread that nobody told"


def rates(protocol):
    """Verification rates in %, by FNet, SRNet and rows, that the zoo keeps."""
    return {
        (cell.fnet, cell.srnet, cell.height): 100 * results.value(cell, "accuracy")
        for results in catalogue.zoo_results()
        if catalogue.circumstances(results)["protocol"] == protocol
        for cell in results.cells("verification")
    }


def test_figures_of_the_readme_and_the_cards_are_those_that_are_kept():
    rows = {"7x6": 7, "14x12": 14, "28x24": 28}
    kept = {protocol: rates(protocol) for protocol in ("paper", "real_world")}
    seen = set()
    for text in (ROOT / "README.md", *(ROOT / "zoo").glob("*/README.md")):
        protocol = "real_world" if text.parent.name.endswith("real_world") else "paper"
        fnet, head = "mobilefacenet", []
        for line in text.read_text("utf-8").splitlines():
            cells = [cell.strip(" *") for cell in line.strip("|").split("|")]
            if rows.keys() & {*cells}:
                head = cells
            elif len(cells) != len(head) or "`" not in line:
                continue
            elif head[0] == "FNet":  # which stands there once for its rows
                fnet = (re.findall("`(.*?)`", cells[0]) or [fnet])[0]
                fnet = {"edgeface_xxs": "edgeface_xxs_q"}.get(fnet, fnet)
            named = dict(zip(head, cells, strict=False))
            srnet = named.get("SRNet", cells[0]).strip("`").partition("`")[0]
            for size in rows.keys() & named.keys():
                told = kept[protocol].get((fnet, srnet, rows[size]))
                if told is not None:
                    seen.add((protocol, fnet, srnet, size))
                    assert float(named[size]) == pytest.approx(told, abs=0.005)
    # four methods with three FNets, two more with one, interpolation with the FNet of small faces;
    # three methods at two sizes of the real world
    assert len(seen) == 3 * (4 * 3 + 2 + 1) + 3 * 2


def test_each_model_is_counted_without_its_weights():
    assert describe_model("mobilefacenet.casia_webface") == catalogue.ModelFacts(
        "mobilefacenet.casia_webface",
        "FNet",
        parameters=1_003_136,
        multiply_adds=220_965_376,
        input=(112, 112),
        crop="arcface",
        licence="mit",
        training_data="CASIA-WebFace",
        lfw=98.78,
        size=4_155_613,
        cached=describe_model("mobilefacenet").cached,
    )
    ours = describe_model("edsr16_64_id")
    assert (ours.parameters, ours.cached, ours.lfw) == (1_517_571, True, None)
    assert ours.size == (ROOT / "zoo" / "edsr16_64_id" / "model.safetensors").stat().st_size
    # 16 blocks of two 3x3 convolutions and one more, at 28x24, and what follows
    low, mid, high = 28 * 24, 56 * 48, 112 * 96
    convolutions = 33 * 64 * 64 * low + 3 * 64 * low + 64 * 256 * (low + mid) + 64 * 3 * high
    assert ours.multiply_adds == 9 * convolutions


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0"),
        (999, "999"),
        (999_936, "1.00 M"),
        (22_670_656, "22.7 M"),
        (15_466_168_320, "15.5 G"),
    ],
)
def test_counts_have_three_digits(count, shown):
    assert catalogue._rounded(count) == shown


def test_filters():
    every = find_models()
    assert {one.name.partition(".")[0] for one in every} >= {*list_fnets(), *list_srnets()}
    assert [one.name for one in find_models("sface", licence="MIT")] == [
        "sface.clcarwin_casia_webface"
    ]
    assert {one.crop for one in find_models(kind="fnet", crop="arcface")} == {"arcface"}
    assert "bicubic" not in [one.name for one in find_models(pretrained=True)]
    assert "edsr16_64.celeba_aaf" in [one.name for one in find_models(kind="srnet", cached=True)]
    with pytest.raises(ValueError, match="Did you mean 'fnet'"):
        find_models(kind="fnets")


@pytest.mark.parametrize(
    ("name", "create", "options"),
    [("our_net", create_srnet, {"depth": 1, "width": 4}), ("our_fnet.small", create_fnet, {})],
)
def test_a_folder_of_the_zoo_is_found_by_its_name(zoo, name, create, options, monkeypatch):
    """Nobody is asked: no address is ever looked up."""

    def nobody(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.getaddrinfo", nobody)
    arch = "edsr16_64" if create is create_srnet else "mobilefacenet"
    torch.manual_seed(0)
    net = create(arch, **options).eval()
    told = {"idloss": {"kind": "srnet" if options else "fnet", "training_data": "drawn faces"}}
    save_for_hf(net, zoo / name, model_config=told, model_args=options, safe_serialization=True)
    x = faces(1, (112, 112))
    with torch.no_grad():
        assert torch.equal(create(name, pretrained=True).eval()(x), net(x))
    (facts,) = find_models(name)
    assert (facts.kind, facts.training_data, facts.cached) == (
        "SRNet" if options else "FNet",
        "drawn faces",
        True,
    )
    assert facts.parameters == sum(parameter.numel() for parameter in net.parameters())
    assert catalogue.fetch_model(name) == zoo / name / "model.safetensors"
    assert f"`{name}`" in catalogue.markdown()


def test_results_are_kept_with_how_they_came_about(tmp_path):
    run = {
        "data": {"name": "LFW", "list": "ab12"},
        "protocol": {"name": "paper"},
        "seed": 3,
        "command": ["idloss", "evaluate"],
    }
    results = Results(run, environment={"processor": "AMD"})
    for method, value in (("ours", 0.75), (HR, 0.99)):
        cell = Cell("verification", "sface", method, 7, 6)
        results.add(cell, {"accuracy": Estimate(value, value, 0.01, 0.7, 1.0, 10)})
    path = catalogue.keep_results(results, tmp_path / "table.csv", commit="abc\ndef")
    again = catalogue.read_results(path)
    assert again.records == results.records
    assert again.run["commit"] == "abc def"
    (table,) = catalogue.result_tables([again], {"ours"})
    assert "LFW, protocol `paper`; commit abc def; seed 3" in table
    assert "**75.00**" in table
    assert "idloss evaluate" in table
    assert catalogue.result_tables([again], {"theirs"}) == []
    path.write_text("# data: x\ntask,fnet\nverification,sface\n")
    with pytest.raises(ValueError, match=r"table\.csv is not a table of results"):
        catalogue.read_results(path)
