"""What a model's feature partitions held at each revision of the lake, and into which of it a raw day went."""

import datetime as dt
import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

from mlops_dagster.core.errors import NotFoundError
from mlops_dagster.core.late_data import day_of
from mlops_dagster.lineage import origins
from mlops_dagster.resources.data_lake import Lake
from mlops_dagster.resources.data_versions import DataVersions, Revision


@dataclass(frozen=True)
class Content:
    """What a key held from the revision `commit` on, as MD5; `of_day`: the raw day went into it, or nobody recorded what did."""

    key: str
    md5: str
    commit: str
    of_day: bool = False


@dataclass
class FeatureHistory:
    """The history of a model's features as one raw day sees it.

    `feature_days`: the first and the last day whose features read the raw day, which is the first. `revisions`: of the model, oldest
    first; a position is an index of them.
    """

    lake: Lake
    versions: DataVersions
    model: str
    feature_days: tuple[dt.date, dt.date]
    revisions: Sequence[Revision]
    _changes: dict[str, list[tuple[int, str | None]]] = field(init=False, default_factory=dict)
    _views: dict[str, list[str]] = field(init=False, default_factory=dict)
    _judged: dict[str, list[tuple[int, Content | None]]] = field(init=False, default_factory=dict)
    _made_of: dict[str, bool] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        for position, revision in enumerate(self.revisions):
            for key, md5 in revision.files.items():
                self._changes.setdefault(key, []).append((position, md5))
        prefix = f"{self.model}/features/"
        for key in sorted(origins.between((k for k in self._changes if k.startswith(prefix)), dt.date.min, dt.date.max)):
            self._views.setdefault(key.removeprefix(prefix).rpartition("/")[0], []).append(key)

    def recorded(self, key: str) -> int | None:
        """The position of the revision that recorded a key first; None for a key that none did."""
        return next((position for position, md5 in self._changes.get(key, ()) if md5 is not None), None)

    def keys(self, view: str, first: dt.date, last: dt.date) -> Sequence[str]:
        """The partitions that a view has or had of the days first … last, in their order."""
        keys = self._views.get(view, [])
        begin = bisect_right(keys, first - dt.timedelta(days=1), key=day_of)
        return keys[begin : bisect_right(keys, last, key=day_of)]

    def at(self, key: str, position: int | None) -> Content | None:
        """What a key held at a position (None: the newest); None where it was not in the lake."""
        states = self._states(key)
        found = len(states) if position is None else bisect_right(states, position, key=lambda state: state[0])
        return states[found - 1][1] if found else None

    def ever_of_day(self, key: str) -> list[Content]:
        """Every content that a features partition had and that the raw day went into, each once."""
        return [*{c.md5: c for _, c in self._states(key) if c is not None and c.of_day}.values()]

    def read_bytes(self, content: Content) -> bytes:
        """A content, in quarantine or corrected since though it may be. Raises StorageError where nobody has it any more."""
        if self._changes[content.key][-1][1] == content.md5:  # so that nothing has to be fetched from the versions' remote
            try:
                found = self.lake.read_bytes(content.key)
            except NotFoundError:
                found = b""
            if origins.md5(found) == content.md5:
                return found
        return self.versions.restore(content.key, content.commit).read_bytes()

    def _states(self, key: str) -> list[tuple[int, Content | None]]:
        """Each change of a key and, for features in reach of the raw day, of what they are said to be made of.

        A partition that is made again in place keeps its old rows (a correction must not change what was known before it), so the raw
        day stays in it until it leaves the lake or holds what it once held without the day.
        """
        if key not in self._judged:
            origin = self._origin(key)
            without, still, states = set[str](), False, []
            for position in sorted({position for k in (key, origin) for position, _ in self._changes.get(k, ())}):
                md5 = self._md5(key, position)
                made_of_day = md5 is not None and bool(origin) and self._is_made_of_day(origin, position)
                still = made_of_day or (still and md5 is not None and md5 not in without)
                without |= {md5} if md5 is not None and not still else set()
                content = None if md5 is None else Content(key, md5, self.revisions[position].commit, still)
                states.append((position, content))
            self._judged[key] = states
        return self._judged[key]

    def _origin(self, key: str) -> str:
        """The key that says what a features partition was made of; '' for one out of the raw day's reach and for any other key."""
        features, (first, last) = key.startswith(f"{self.model}/features/"), self.feature_days
        day = day_of(key) if features else None
        return f"{self.model}/{origins.FOLDER}/features/{day}.json" if day and first <= day <= last else ""

    def _is_made_of_day(self, origin: str, position: int) -> bool:
        md5 = self._md5(origin, position)
        if md5 is None:  # features from before their origins were kept
            return True
        if md5 not in self._made_of:
            made_of = json.loads(self.read_bytes(Content(origin, md5, self.revisions[position].commit)))
            self._made_of[md5] = self.feature_days[0] in map(day_of, made_of)
        return self._made_of[md5]

    def _md5(self, key: str, position: int) -> str | None:
        changes = self._changes.get(key, [])
        found = bisect_right(changes, position, key=lambda change: change[0])
        return changes[found - 1][1] if found else None


def load(lake: Lake, versions: DataVersions, model: str, feature_days: tuple[dt.date, dt.date]) -> FeatureHistory:
    """The history from the raw day on; of older partitions nothing is read."""
    training_sets, later = f"{model}/training_set/", origins.of_days(feature_days[0], dt.date.max)
    prefixes = (training_sets, f"{model}/features/", f"{model}/{origins.FOLDER}/features/")
    revisions = versions.history(prefixes, only=lambda key: key.startswith(training_sets) or later(key))
    return FeatureHistory(lake, versions, model, feature_days, revisions[::-1])
