"""Judges programs with two processes: the tests' (T) and the student's (S).

T runs the test statements and holds the verdict.  It imports nothing of the student: the names of
the student's module are proxies whose every use is a request over a socket to S.  Values travel as
tagged plain data (``wire``), mutable containers as twins that are kept alike (``heap``), and all
other objects as handles (``proxies``).  Nothing is pickled and nothing received is evaluated, so
frames, the garbage collector, patched modules and exits in S reach neither tests nor verdict.

  wire, values   values <-> bytes, strict and bounded
  heap           twins of mutable containers
  known          what travels by name: builtins, exceptions, modules
  channel        frames over a socket
  handles        objects, classes and exceptions by number
  ties, methods  proxies: what binds them, their operators, what is believed of the answers
  specials       the special methods that cross
  proxies        makes the classes and objects that stand for the other side's
  peer           one end of the conversation: asks, serves
  student        S's end: runs the program, serves everything
  examiner       T's end: runs the tests, believes nothing it need not
  script         a program with standard input and output instead of tests
  failures       categories of exceptions
  report         what the parent and T tell each other
  warmup         runs both ends once, before the server forks

What T believes
  - Plain data is compared in T, on T's own copies.  An object of the student never equals plain
    data; a subclass of a builtin compares by the builtin value it carries.
  - Comparisons between two of the student's objects are answered by S, except by objects that
    equal everything.
  - The student's operators may answer about plain operands (``3 in box``, ``vec * 2``) only for
    objects that the tests made themselves by calling a class (a name with a capital letter).  What
    a function or method returned may still take part in arithmetic, but the result then only has
    text and equality with other objects: no number can be read from it, as in
    ``abs(f(2) - 1.41421) < 1e-5`` with an operator that always answers 0.
  - ``in`` on an object that a function returned looks at its items, here.
  - A context manager of the student ends only exceptions that the tests raised on purpose.
  - The program's names never stand in for builtins or modules: ``abs`` and ``math`` are Python's.

Whose fault
  A name that tests need and neither they nor Python define is missing in the program.  Tests that
  are no Python, import what is not installed, end their own process, or never use the program
  cannot judge: ERROR.

What tests cannot do
  See the program's changes to a class that they define (class decorators that add methods), patch
  builtins for the program (``input``), share files or databases with it, or pickle its objects.
"""
