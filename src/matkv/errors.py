"""Every error matkv raises on purpose; each message names the value and the remedy.

MatkvError
├── ArtifactError           a directory that is not a usable artifact
│   └── FingerprintError    a sound artifact, but made for another model
├── BudgetError             a budget outside (0, 1], or one no table can hold
├── RankError               ranks that do not fit the model or the bases
├── SizeError               a layer or dimension that an embedding model does not have
├── DataError               text that is missing, empty, too short or malformed
├── ModelError              a model that cannot be found or loaded
│   └── UnsupportedModelError   loaded, but compressing it would be silently wrong
├── CacheError              a cache used in a way that would lose or mix up tokens
└── TrainingError           settings that do not fit, a loss that is no number, a foreign checkpoint
"""


class MatkvError(Exception):
    """Base of all errors a caller can act on; the command line prints it as one line."""


class ArtifactError(MatkvError):
    """The artifact is missing, foreign, damaged or of another format version."""


class FingerprintError(ArtifactError):
    """The artifact was made for another model than the one at hand."""


class BudgetError(MatkvError):
    """A budget is not in (0, 1], or no rank table holds it."""


class RankError(MatkvError):
    """Ranks do not fit the model's geometry or the bases."""


class SizeError(MatkvError):
    """A size of an embedding model is written wrongly, or the model has no such size."""


class DataError(MatkvError):
    """Text or a data file is missing, empty, too short or malformed."""


class ModelError(MatkvError):
    """A model or tokenizer cannot be found or loaded."""


class UnsupportedModelError(ModelError):
    """The model has attention that latents cannot reproduce exactly, so it is refused."""


class CacheError(MatkvError):
    """A cache is used in a way that would lose or mix up tokens."""


class TrainingError(MatkvError):
    """Training is set up wrongly, has diverged, or cannot go on from a checkpoint."""


def first_line(error: BaseException) -> str:
    """What an error of another library says, for a message of one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
