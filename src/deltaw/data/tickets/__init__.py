"""The demo's task: a customer's message in free English becomes one line of JSON for a ticket system.

``{"product":…,"order":… or null,"problem":…,"wish":…,"urgency":…}``: two fields are copied out of
the message to the letter, three are classified. The held-out split has its own products, its own formats of
order numbers and its own sentences, so that a score on it measures what was learnt, not what was remembered.
"""

from .asking import fair_prompt
from .make import FIELDS, SYSTEM_PROMPT, Split, make_tickets, write_tickets
from .wording import PROBLEMS, URGENCIES, WISHES

__all__ = [
    "FIELDS",
    "PROBLEMS",
    "SYSTEM_PROMPT",
    "URGENCIES",
    "WISHES",
    "Split",
    "fair_prompt",
    "make_tickets",
    "write_tickets",
]
