"""The process and the machine that everything runs in; nothing here knows of models.

``process`` (threads and memory, set before torch is imported; signals), ``files`` (whole or not there), ``device`` (where a
command computes), ``precision`` (in which number format), ``environment`` (what a measurement was made on), ``extras``
(optional packages), ``hub`` (what it has given before), ``fields`` (dataclasses of settings: read from text, checked),
``meanings`` (what their docstrings say of each field), ``progress_bar`` (on a terminal, or lines in a file), ``pictures``
(written to files), ``names`` (shown as they are), ``tables`` (for a terminal and in Markdown), ``streams`` (standard input and
output, whatever they are).
"""
