"""cosr_jax: a small student learns from measured failures, in JAX.

The rooms follow the data: ``curator`` plans, ``tasks`` admits and draws problems, ``rollout``
samples the ``student``, ``verifiers`` judge, ``train`` takes one compiled step, and ``run``
measures, saves and hands progress back.  ``cosr_jax/run/loop.py`` tells the whole story.
"""

__version__ = "0.1.0"
