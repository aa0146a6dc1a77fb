"""The command; see the package."""

from instructblip.capfilt.command import capfilt
from instructblip.config.entry import main
from instructblip.config.schema import CapFiltConfig

if __name__ == "__main__":
    main("capfilt", CapFiltConfig, capfilt)
