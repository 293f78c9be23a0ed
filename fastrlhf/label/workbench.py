"""Who judges what: which prompt each annotator sees next, what they said, and what they took back.

All of it is rebuilt from two files that are only appended to: the feedback itself, and `.NAME.session` beside it with
what is no feedback: the annotators' tokens, and which prompt was put before whom.
"""

from __future__ import annotations

import hmac
import os
import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastrlhf.checkpoint import lock
from fastrlhf.config.errors import UserError
from fastrlhf.label.items import Item, Say
from fastrlhf.label.judgement import Refused, as_shown, judgement_id, row_of, same, shown_order, undone_row
from fastrlhf.label.store import AppendLog

_NAME = re.compile(r"[^\W_][\w .@+-]{0,63}")


def check_annotators(names: Sequence[str]) -> None:
    """UserError for names that cannot stand in an address or in a judgement's id, and for two that are the same."""
    for name in names:
        if not _NAME.fullmatch(name) or name != name.strip():
            rule = "begin with a letter or digit, then letters, digits, spaces and . _ - + @, at most 64"
            raise UserError(f"--annotators: {name!r} is no name: {rule}; names are separated by commas")
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise UserError(f"--annotators: {repeated!r} stands there twice; give each person a name of their own")


class Workbench:
    """The judgements of some annotators on some items.

    One process has the output at a time (UserError names it). A prompt is put before at most `per_prompt` people; who
    has one on the screen keeps it over a restart, unless they are no longer among the annotators. Nothing here waits:
    calls from one thread cannot come between each other.
    """

    def __init__(
        self, items: Sequence[Item], annotators: Sequence[str], output: Path, say: Say, *, per_prompt: int = 1
    ) -> None:
        self.items = {item.id: item for item in items}
        self.per_prompt = per_prompt
        self.output = output = Path(os.path.realpath(output))
        lock.acquire(output)  # before the file is read: an end that another server is just writing is no torn one
        self.log = AppendLog(output, say)
        self.session = AppendLog(output.with_name(f".{output.name}.session"), say, mode=0o600)
        self.tokens = self._tokens(annotators)
        self._shown: dict[str, set[str]] = {item: set() for item in self.items}  # item -> who saw it
        self._given: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in annotators}  # in the order given
        self._open: dict[str, list[str]] = {name: [] for name in annotators}  # the last is on the screen
        self._restore(say)

    def _tokens(self, annotators: Sequence[str]) -> dict[str, str]:
        """A token a person, the one of before where there is one."""
        known = {row["annotator"]: row["token"] for row in self.session.rows if "token" in row}
        for name in annotators:
            if name not in known:
                known[name] = secrets.token_urlsafe(16)
                self.session.append({"annotator": name, "token": known[name]})
        return {name: known[name] for name in annotators}

    def _restore(self, say: Say) -> None:
        undone: dict[str, list[str]] = {name: [] for name in self._open}
        others = 0
        for row in self.log.rows:
            name, _, item = str(row.get("judgement_id", "")).rpartition(":")
            if item not in self.items or row.get("annotator") != name:
                others += 1
                continue
            self._shown[item].add(name)
            given = self._given.setdefault(name, {})
            given.pop(item, None)
            if row.get("undone"):
                undone.setdefault(name, []).append(item)
            else:
                given[item] = row
        if others:
            say(f"{self.output}: {others} rows are about other prompts or replies and stay as they are")
        for row in self.session.rows:
            name, item = row.get("annotator"), row.get("shown")
            if item in self.items and name in self._open:  # of people who are gone only what they judged counts
                self._shown[item].add(name)
                if item not in self._given[name] and item not in undone[name]:
                    self._open[name].append(item)
        for name, items in undone.items():
            taken_back = [item for item in dict.fromkeys(reversed(items)) if item not in self._given[name]]
            if name in self._open:
                self._open[name] += reversed(taken_back)
            else:
                for item in taken_back:
                    self._shown[item].discard(name)

    def is_annotator(self, name: str, token: str) -> bool:
        """Whether the token is that person's; takes as long for a wrong one as for a right one."""
        return hmac.compare_digest(self.tokens.get(name, "").encode(), token.encode()) and name in self.tokens

    # ------------------------------------------------------------------------------------------------------- the page

    def screen(self, annotator: str) -> dict[str, Any]:
        """What the page shows: an item without anything that tells where its replies come from, and the progress."""
        item, given = self._current(annotator), self._given[annotator]
        left = sum(1 for one in self.items if self._may_see(annotator, one)) + len(self._open[annotator])
        skipped = sum(1 for row in given.values() if row.get("skipped"))
        return {
            "item": None if item is None else self._shown_item(annotator, item),
            "judged": len(given) - skipped,
            "skipped": skipped,
            "left": left,
            "last": next(reversed(given), None),
        }

    def _shown_item(self, annotator: str, item: Item) -> dict[str, Any]:
        texts = [item.replies[index].text for index in shown_order(annotator, item)]
        prompt = [{"role": "user", "content": item.prompt}] if isinstance(item.prompt, str) else item.prompt
        turns = [{"role": message["role"], "content": message["content"]} for message in prompt]
        name = judgement_id(annotator, item)
        rows = (row for row in reversed(self.log.rows) if row.get("judgement_id") == name)
        before = next((row for row in rows if not row.get("undone")), None)  # taken back, in order to be changed
        return {"id": item.id, "turns": turns, "replies": texts, "before": before and as_shown(before, item, annotator)}

    def _may_see(self, annotator: str, item: str) -> bool:
        return annotator not in self._shown[item] and len(self._shown[item]) < self.per_prompt

    def _current(self, annotator: str) -> Item | None:
        """What is on this annotator's screen; a new one is put there where nothing is."""
        if not self._open[annotator]:
            item = next((one for one in self.items if self._may_see(annotator, one)), None)
            if item is None:
                return None
            self.session.append({"annotator": annotator, "shown": item})
            self._shown[item].add(annotator)
            self._open[annotator].append(item)
        return self.items[self._open[annotator][-1]]

    def judge(self, annotator: str, body: dict[str, Any]) -> None:
        """Keep a judgement of what is on the screen; the same one sent again is kept once. Raises Refused, and OSError
        where the disk refuses it; the item stays on the screen then."""
        item = self._item(body)
        row = row_of(body, item, annotator)
        given = self._given[annotator]
        if item.id in given and same(given[item.id], row):
            return
        if not self._open[annotator] or self._open[annotator][-1] != item.id:
            known = "you have judged it already; undo takes that back" if item.id in given else "it is not yours"
            raise Refused(f"this prompt is not on your screen: {known}", 409)
        self.log.append(row)
        self._open[annotator].pop()
        given[item.id] = row

    def undo(self, annotator: str, body: dict[str, Any]) -> None:
        """Take back the judgement that the page believes to be the last, and put its item on the screen again."""
        item, given = self._item(body), self._given[annotator]
        if item.id in self._open[annotator]:
            return  # the answer to the first time did not arrive
        if item.id != next(reversed(given), None):
            raise Refused("this is not your last judgement", 409)
        self.log.append(undone_row(given[item.id]))
        del given[item.id]
        self._open[annotator].append(item.id)

    def _item(self, body: dict[str, Any]) -> Item:
        item = self.items.get(body["item"]) if isinstance(body.get("item"), str) else None
        if item is None:
            raise Refused(f"there is no prompt {body.get('item')!r}", 404)
        return item

    def close(self) -> None:
        """Give the output back."""
        lock.release(self.output)
        self.log.close()
        self.session.close()
