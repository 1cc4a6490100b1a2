"""The demo's task: a customer's message in free English becomes one line of JSON for a ticket system.

``{"product":…,"order":… or null,"problem":…,"wish":…,"urgency":…}``: two fields are copied out of
the message to the letter, three are classified. The held-out split has its own products, its own formats of
order numbers and its own sentences, so that a score on it measures what was learnt, not what was remembered.
"""

from deltaw.data.tickets.make import FIELDS, SYSTEM_PROMPT, Split, make_tickets, write_tickets
from deltaw.data.tickets.score import fair_prompt, field_matches, is_match
from deltaw.data.tickets.wording import PROBLEMS, URGENCIES, WISHES

__all__ = [
    "FIELDS",
    "PROBLEMS",
    "SYSTEM_PROMPT",
    "URGENCIES",
    "WISHES",
    "Split",
    "fair_prompt",
    "field_matches",
    "is_match",
    "make_tickets",
    "write_tickets",
]
