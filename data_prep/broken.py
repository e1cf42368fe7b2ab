"""What a conversion leaves out: one rule for all of them."""

from crystal.runtime.config import UserError

MOST = 0.01  # share of what is read that may be broken


def leave_out(line, lines, skip, total, what):
    """Appends `line`, which names what is broken, to `lines`. UserError without --on_bad_record skip, and
    above 1 % of `total`. what: rows, questions ..
    """
    if not skip:
        raise UserError(f"{line}; --on_bad_record skip leaves such {what} out")
    lines.append(line)
    if len(lines) > max(1, MOST * total):
        raise UserError(f"{len(lines)} broken {what}, more than 1 % of {total}; the last: {line}")
