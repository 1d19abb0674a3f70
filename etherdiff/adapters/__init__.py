"""ETHER, ETHER+ and their companions as PEFT tuners; importing this package registers them with PEFT."""

from etherdiff.adapters.baselines import MagnitudeConfig, NaiveConfig
from etherdiff.adapters.ether import EtherConfig

__all__ = ["EtherConfig", "MagnitudeConfig", "NaiveConfig"]
