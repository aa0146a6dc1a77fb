"""The command; see the package."""

from instructblip.config.entry import main
from instructblip.config.schema import StudyCommandConfig
from instructblip.study.command import study

if __name__ == "__main__":
    main("study", StudyCommandConfig, study)
