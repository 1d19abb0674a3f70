"""ETHER, ETHER+ and their companions as PEFT tuners; importing this package registers them with PEFT."""

from etherdiff.adapters.ether import EtherConfig
from etherdiff.adapters.magnitude import MagnitudeConfig
from etherdiff.adapters.naive import NaiveConfig

__all__ = ["EtherConfig", "MagnitudeConfig", "NaiveConfig"]
