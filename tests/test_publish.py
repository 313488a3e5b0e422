"""Models to the Hub and back, by the real client, against its stand-in on loopback."""

import json

import pytest
import timm
import torch
from huggingface_hub import ModelCard, constants
from nets import faces
from servers import HubServer
from timm.models import save_for_hf

from idloss import create_fnet, create_srnet, weights
from idloss.catalogue import describe_model, fetch_model
from idloss.evaluation import Cell, Results
from idloss.evaluation.statistics import Estimate
from idloss.publish import prepare_publication

SMALL = {"depth": 1, "width": 4}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The stand-in, which the client takes for the Hub, and an empty cache."""
    for name, folder in (("HF_HOME", "hf"), ("HF_HUB_CACHE", "hf/hub")):
        monkeypatch.setattr(constants, name, str(tmp_path / folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_TOKEN", HubServer.TOKEN)
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + template)
        yield server


@pytest.fixture
def run(tmp_path):
    """The folder of a run, with a network as training saves it."""
    torch.manual_seed(0)
    network = create_srnet("edsr16_64", **SMALL).eval()
    told = {
        "kind": "srnet",
        "registered": True,
        "recipe": {"iterations": 3, "crop": "sphereface"},
        "data": {"sha256": "ab", "faces": 1200, "identities": 30},
    }
    save_for_hf(
        network,
        tmp_path / "run" / "model",
        model_config={"idloss": told},
        model_args=SMALL,
        safe_serialization=True,
    )
    return tmp_path / "run", network


@pytest.fixture
def publish(hub, tmp_path):
    """Prepare and upload; gives the publication and the commit."""
    count = iter(range(10))

    def call(model, to="me/net", **options):
        publication = prepare_publication(str(model), to, tmp_path / f"{next(count)}", **options)
        return publication, publication.upload()

    return call


def same(a, b):
    x = faces(2, (7, 6))
    with torch.no_grad():
        return torch.equal(a.eval()(x), b.eval()(x))


def test_a_run_goes_to_the_hub_and_comes_back(run, publish, hub):
    folder, network = run
    publication, commit = publish(folder, licence="mit", training_data="drawn faces")
    held = hub.repos["me/net"].at("main")
    assert set(held) == {"README.md", "config.json", "model.safetensors"}
    assert held["README.md"].decode() == publication.card
    assert not hub.repos["me/net"].private
    for name in ("hf-hub:me/net", f"hf-hub:me/net@{commit}"):
        assert same(create_srnet(name, pretrained=True), network)
        assert same(timm.create_model(name, pretrained=True), network)
    config = json.loads(held["config.json"])
    assert config["idloss"]["recipe"]["iterations"] == 3
    assert config["idloss"]["crop"] == "sphereface"
    assert (config["idloss"]["kind"], config["pretrained_cfg"]["license"]) == ("srnet", "mit")


def test_a_pinned_revision_stays_what_it_was(run, publish, hub, monkeypatch):
    folder, network = run
    _, first = publish(folder, licence="mit")
    torch.manual_seed(1)
    other = create_srnet("edsr16_64", **SMALL)
    save_for_hf(other, folder / "model", model_args=SMALL, safe_serialization=True)
    _, second = publish(folder, licence="mit")
    assert first != second
    assert same(create_srnet(f"hf-hub:me/net@{first}", pretrained=True), network)
    assert same(create_srnet("hf-hub:me/net", pretrained=True), other)
    with pytest.raises(weights.NotFoundError, match="the revision is gone"):
        create_srnet(f"hf-hub:me/net@{'0' * 40}", pretrained=True)
    (file, of_first) = (fetch_model(f"hf-hub:me/net{at}") for at in ("", f"@{first}"))
    assert file.name == of_first.name == "model.safetensors"
    assert file != of_first
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.seen)
    assert describe_model("hf-hub:me/net").cached
    assert same(create_srnet(f"hf-hub:me/net@{first}", pretrained=True), network)
    assert len(hub.seen) == asked


def test_renamed_repositories_are_followed(run, publish, hub):
    folder, network = run
    publish(folder, licence="mit")
    hub.renamed["old/name"] = "me/net"
    assert same(create_srnet("hf-hub:old/name", pretrained=True), network)


def test_private_and_gated_repositories_need_a_token(run, publish, hub, monkeypatch):
    folder, network = run
    publish(folder, private=True, licence="mit")
    publish(folder, "me/gated", licence="mit")
    hub.repos["me/gated"].gated = True
    assert hub.repos["me/net"].private
    assert same(create_srnet("hf-hub:me/net", pretrained=True), network)
    with pytest.raises(weights.NotAllowedError, match="accept the terms, if there are any, at"):
        create_srnet("hf-hub:me/gated", pretrained=True)
    monkeypatch.setenv("HF_TOKEN", HubServer.ACCEPTED)
    assert same(create_srnet("hf-hub:me/gated", pretrained=True), network)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "empty"))
    for name in ("me/net", "me/gated"):
        with pytest.raises(weights.NotAllowedError, match=f"{name}: the Hub answered 401"):
            create_srnet(f"hf-hub:{name}", pretrained=True, cache_dir=str(folder / "empty"))
    with pytest.raises(weights.NotAllowedError, match="publishing to me/net: the Hub answered 401"):
        publish(folder, licence="mit")


def test_what_must_stay_private_does_not_go_to_a_public_repository(run, publish, hub):
    publish(run[0], licence="mit")
    before = dict(hub.repos["me/net"].commits)
    with pytest.raises(weights.NotAllowedError, match="me/net exists and is public"):
        publish(run[0], licence="mit", private=True)
    assert hub.repos["me/net"].commits == before


def test_a_foreign_fnet_keeps_its_licence_and_crop(publish, hub, tmp_path):
    """As EdgeFace is published: a model of timm's whose last layer is the embedding."""
    torch.manual_seed(0)
    net = timm.create_model("edgenext_xx_small", num_classes=32)
    cfg = {"input_size": (3, 112, 112), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    cfg |= {"license": "cc-by-nc-sa-4.0", "crop_pct": 1.0}
    net.pretrained_cfg.update(cfg)
    save_for_hf(net, tmp_path / "net", safe_serialization=True)
    publication, _ = publish(f"local-dir:{tmp_path / 'net'}")
    metadata = ModelCard(publication.card).data
    assert (metadata.license, metadata.pipeline_tag) == (
        "cc-by-nc-sa-4.0",
        "image-feature-extraction",
    )
    opened = create_fnet("hf-hub:me/net", pretrained=True).eval()
    assert (opened.crop, opened.num_features) == ("arcface", 32)
    x = faces(1, (112, 112))
    with torch.no_grad():
        assert torch.equal(opened(x), net.eval()(x))


def test_the_card_says_what_it_is_and_what_was_measured(run, tmp_path):
    publication = prepare_publication("edsr16_64_id", "me/net", tmp_path / "out")
    for words in (
        'idloss.create_srnet("hf-hub:me/net"',
        'timm.create_model("hf-hub:me/net"',
        'torch.hub.load("<owner>/idloss", "srnet", "hf-hub:me/net")',
        "1,517,571",
        "10,605 faces of 1,072 people of CelebA",
        "research use only, as CelebA is",
        "protocol `paper`",
        "**74.65**",
        "## Notes",
        "@inproceedings{lai2019",
    ):
        assert words in publication.card
    metadata = ModelCard(publication.card).data
    assert (metadata.license, metadata.model_name) == ("other", "net")
    figures = {
        figure.dataset_config: figure.metric_value
        for figure in metadata.eval_results
        if figure.metric_type == "accuracy"
    }
    assert figures["7x6, mobilefacenet"] == pytest.approx(0.7465)
    own = Results(
        {"data": {"name": "LFW"}, "protocol": {"name": "standard"}, "command": ["a", "b"]}
    )
    own.add(
        Cell("verification", "sface", "mine", 7, 6),
        {"accuracy": Estimate(0.123, 0.123, 0, 0, 1, 10)},
    )
    card = prepare_publication(
        str(run[0]), "me/net", tmp_path / "own", licence="mit", results=[own]
    ).card
    assert "LFW, protocol `standard`" in card
    assert "**12.30**" in card
    assert "66.83" not in card
    # what an entry point says is of the weights that were registered with it
    for words in ("depth=1, width=4", "iterations: 3", "1,200 faces of 30 people", "sphereface"):
        assert words in card
    assert "lambda" not in card


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        ("sface.casia_webface", {}, "may not be published, by its licence"),
        ("edsr16_64_id", {"licence": "mit"}, "is under another licence"),
        ("bicubic", {}, "has no licence: say yours, such as --licence mit"),
        ("hf-hub:a/b", {}, "is on the Hub already"),
        ("edsr16_65", {}, "unknown model 'edsr16_65'. Did you mean 'edsr16_64'"),
        ("edsr16_64", {"repo": "net"}, "--to takes owner/name, got 'net'"),
        ("edsr16_64", {"repo": "a/b/c"}, "a/b/c"),
    ],
)
def test_what_may_not_be_published_is_refused(model, options, said, tmp_path):
    to = options.pop("repo", "me/net")
    with pytest.raises(ValueError, match=said.replace(".", r"\.")):
        prepare_publication(model, to, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_what_a_run_began_with_binds_it(run, tmp_path):
    config = run[0] / "model" / "config.json"
    told = json.loads(config.read_text())
    told["idloss"]["began_with"] = {"license": "none given: download from the origin"}
    config.write_text(json.dumps(told))
    with pytest.raises(ValueError, match="by that of what it began with"):
        prepare_publication(str(run[0]), "me/net", tmp_path / "out", licence="mit")
    prepare_publication(str(run[0]), "me/net", tmp_path / "out", licence="mit", private=True)


def test_files_that_open_as_another_network_are_not_published(run, tmp_path, monkeypatch):
    def save(network, folder, **options):
        other = create_srnet("edsr16_64", **SMALL)
        save_for_hf(other, folder, model_args=SMALL, safe_serialization=True)

    monkeypatch.setattr("idloss.publish.save_for_hf", save)
    with pytest.raises(ValueError, match="opens as another network from its own files"):
        prepare_publication(str(run[0]), "me/net", tmp_path / "out", licence="mit")
