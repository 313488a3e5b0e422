"""Protocols by name: what they fix, and one's own beside them."""

import json
from dataclasses import replace

import pytest

from idloss.evaluation import Protocol, get_protocol, register_protocol
from idloss.evaluation.protocols import PROTOCOLS
from idloss.plugins import Registry


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=lambda protocol: protocol.name)
def test_protocols_are_frozen_and_described(protocol):
    with pytest.raises(AttributeError):
        protocol.flip = "none"
    plain = json.loads(json.dumps(protocol.describe()))
    assert plain["name"] == protocol.name
    assert plain["rule"]["name"] == protocol.name.replace("real_world", "paper")
    assert plain["rule"]["grid"]["count"] == protocol.rule.grid().size
    counts = {"paper": 10001, "sphereface": 20001, "standard": 400}
    assert plain["rule"]["grid"]["count"] == counts[plain["rule"]["name"]]


def test_own_protocol_is_found_by_its_name(monkeypatch):
    monkeypatch.setattr("idloss.evaluation.protocols.PROTOCOLS", Registry("protocol", **PROTOCOLS))
    own = replace(get_protocol("standard"), name="mine", up_mode="bilinear", source="here")
    assert register_protocol(own) is own is register_protocol(own)
    assert get_protocol("mine") is get_protocol(own) is own
    for name, says in (("mien", "'mien'.*'mine'"), ("?", "Known: mine, paper, real_world")):
        with pytest.raises(ValueError, match=f"unknown protocol .*{says}"):
            get_protocol(name)
    with pytest.raises(ValueError, match="another protocol 'mine': give this one its own name"):
        register_protocol(replace(own, up_mode="nearest"))
    assert isinstance(own, Protocol)
