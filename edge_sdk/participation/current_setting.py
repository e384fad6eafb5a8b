"""How this device trains now: chosen from what it has measured, and chosen anew when that was wrong."""

from __future__ import annotations

from dataclasses import replace

from edge_sdk.connection.link_speed import load_link
from edge_sdk.core.choice.rank import RankChoice
from edge_sdk.core.choice.setting import Ranks, Setting
from edge_sdk.core.errors import InputError
from edge_sdk.core.messages import Assignment, Federation
from edge_sdk.membership.identity import model_of
from edge_sdk.membership.journal import Journal
from edge_sdk.model.files import resolve
from edge_sdk.options import Options, cache_dir
from edge_sdk.participation import decision
from edge_sdk.participation.corrections import Correction, Corrections
from edge_sdk.participation.decision import Decision, Known
from edge_sdk.trials import step_times
from edge_sdk.trials.library_memory import framework_bytes
from edge_sdk.worker.messages import Memory


class CurrentSetting:
    """The choice of one device in one federation, over its life.

    Args:
        federation: what it trains for.
        options: its owner's wishes.
        journal: where corrections of memory predictions and the link's throughput are kept.
    """

    def __init__(self, federation: Federation, options: Options, journal: Journal) -> None:
        self._federation, self._options, self._journal = federation, options, journal
        self._corrections = Corrections(journal.folder / "memory.json")
        self._known = Known()
        self.decision = self._decide()  # refuses what could not fit even if nothing else took memory
        self._known = replace(self._measured(), four_bit=self.decision.four_bit)
        self.decision = self._decide()

    @property
    def choice(self) -> RankChoice:
        """What the next assignment is asked for."""
        return self.decision.choice

    def again(self) -> RankChoice:
        """Choose again before an assignment is asked for: the link may have been measured since."""
        self.decision = self._decide()
        return self.choice

    def setting_for(self, assignment: Assignment) -> Setting:
        """The chosen setting, with what was granted to carry."""
        chosen = self.choice.setting
        return replace(chosen, carry_rank=min(assignment.carry_rank, chosen.carry_rank))

    def smaller(self, setting: Setting) -> Setting:
        """Memory ran out at `setting`: remember that, and choose what still fits of no larger ones.

        What is carried stays, because the coordinator counts on it; its dtype may change.

        Raises:
            InputError: nothing smaller fits.
        """
        predicted, before = self._predicted(setting), self._correction()
        correction = before.after_failure(predicted, before.apply(predicted))
        self._keep(correction)
        if correction.exhausted:
            raise InputError(f"training ran out of memory at {setting}, however small; close other programs")
        ladder = [
            ranks for ranks in decision.ladder_of(self._federation, self._options) if _within(ranks, setting)
        ]
        self.decision = self._decide(ladder or [setting.ranks], setting.carry_rank)
        return self.choice.setting

    def learn(self, setting: Setting, memory: Memory) -> None:
        """A training at `setting` took this much: the next prediction is better.

        A budget that leaves the libraries out is for a base far smaller than they are: its share of what the
        process took cannot be told from theirs.
        """
        if not self._options.budget_covers_libraries:
            return
        peak = memory.accelerator_reserved_bytes or memory.peak_bytes - self._known.framework_bytes
        if peak > 0:
            self._keep(self._correction().after_success(self._predicted(setting), peak))

    # --- parts ---

    def _measured(self) -> Known:
        """What the libraries take, and how long steps last: in children, at the first start on this machine.

        Training in the application's own process adds no libraries that are not there already, and steps
        without a deadline need no prediction.
        """
        options, training = self._options, self._federation.training
        quantise = self.decision.quantise
        counted = options.isolate and options.budget_covers_libraries
        libraries = framework_bytes(options.device, quantise, cache_dir()) if counted else 0
        if not options.isolate:
            return Known(framework_bytes=libraries)
        config = resolve(model_of(self._federation, options)) / "config.json"
        ladder = decision.ladder_of(self._federation, options)
        way = options.device, quantise, options.threads
        wanted = step_times.trial(config, training, ladder, self._federation.carries, way)
        return Known(framework_bytes=libraries, times=step_times.measured(wanted, cache_dir()))

    def _decide(self, ladder: list[Ranks] | None = None, carried: int | None = None) -> Decision:
        correction = self._correction()
        most = correction.most_bytes
        known = replace(
            self._known,
            correction=correction.factor,
            most_bytes=None if most is None else self._known.framework_bytes + most,
            link=load_link(self._journal.link),
        )
        return decision.decide(self._federation, self._options, known, ladder, carried)

    def _predicted(self, setting: Setting) -> int:
        """Uncorrected bytes beside the libraries."""
        return decision.predicted_bytes(self._federation, self._options, self.decision.quantise, setting)

    def _correction(self) -> Correction:
        return self._corrections.of(*self._key())

    def _keep(self, correction: Correction) -> None:
        self._corrections.keep(*self._key(), correction)

    def _key(self) -> tuple[str, str, str]:
        dtype = "nf4" if self._options.quantise else "unquantised"
        return self._federation.base.fingerprint, self._options.device, dtype


def _within(ranks: Ranks, setting: Setting) -> bool:
    return ranks.attention <= setting.ranks.attention and ranks.mlp <= setting.ranks.mlp
