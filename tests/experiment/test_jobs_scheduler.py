"""Who may begin when: nothing is trained twice, nobody waits for ever, whatever dies or fails."""

from collections import Counter
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from stockpot.experiment.plan import Plan, Run, Stage
from stockpot.experiment.scheduler import Scheduler
from stockpot.methods import METHODS


def plan_of(runs):
    """A plan of (trained, deployed) keys: each run's list of stages."""
    return Plan(
        tuple(
            Run(
                f"run{number}",
                METHODS["sequential"](),
                0,
                tuple(
                    Stage(at, (at,), at, 1 + at, "start", trained, deployed)
                    for at, (trained, deployed) in enumerate(stages)
                ),
            )
            for number, stages in enumerate(runs)
        ),
        "data",
    )


# A key belongs to one stage number, as in real plans; few letters make many runs share.
keys = st.sampled_from("abcx")
plans = st.lists(
    st.lists(st.tuples(keys, keys, st.booleans()), min_size=1, max_size=4), min_size=1, max_size=7
).map(
    lambda runs: [
        [
            (f"{at}{trained}", f"{at}{trained}" if same else f"{at}{trained}-{deployed}")
            for at, (trained, deployed, same) in enumerate(stages)
        ]
        for stages in runs
    ]
)


@dataclass
class World:
    """Workers, a store and a record that do as told, and note what they must not see."""

    plan: Plan
    trained: set = field(default_factory=set)
    scored: set = field(default_factory=set)
    finished: Counter = field(default_factory=Counter)
    trainings: Counter = field(default_factory=Counter)
    scorings: Counter = field(default_factory=Counter)
    lost: Counter = field(default_factory=Counter)

    def train(self, stage):
        if stage.trained not in self.trained:
            self.trainings[stage.trained] += 1
            self.trained.add(stage.trained)

    def score(self, stage):
        if stage.deployed not in self.scored:
            self.scorings[stage.deployed] += 1
            self.scored.add(stage.deployed)


class Job:
    """A job under way: its next moment is training, then scoring, then the end of a stage."""

    def __init__(self, run, done, until):
        self.run, self.at, self.until, self.moment = run, done, until, 0


def step(world, scheduler, job):
    """Let a job go on by a moment; whether it is done."""
    if job.at < job.until:
        stage = job.run.stages[job.at]
        if job.moment == 0:
            world.train(stage)
        elif job.moment == 1:
            world.score(stage)
        else:
            world.finished[job.run.id] += 1
            scheduler.stage_ends(job.run.id, stage.number)
            job.at += 1
        job.moment = (job.moment + 1) % 3
        return False
    scheduler.job_ends(job.run.id)
    return True


def under_way(jobs):
    """What is being trained and scored right now, by key."""
    stages = [job.run.stages[job.at] for job in jobs if job.at < job.until]
    return Counter(s.trained for s in stages), Counter(s.deployed for s in stages)


def begin(world, scheduler, jobs, slots, failed=()):
    while len(jobs) < slots and (found := scheduler.next()) is not None:
        run, until = found
        assert run.id not in failed
        assert run.id not in {job.run.id for job in jobs}
        assert scheduler.done(run.id) == world.finished[run.id]
        assert until > world.finished[run.id] or until == len(run.stages)
        jobs.append(Job(run, world.finished[run.id], until))


@given(plans, st.integers(1, 4), st.randoms(use_true_random=False))
@settings(max_examples=300, deadline=None)
def test_everything_is_done_and_each_key_is_trained_and_scored_once(runs, slots, chance):
    world = World(plan_of(runs))
    scheduler = Scheduler(world.plan, {}, world.trained.__contains__, world.scored.__contains__)
    jobs = []
    while not scheduler.over:
        begin(world, scheduler, jobs, slots)
        assert jobs, "nobody works and not all is done"
        job = chance.choice(jobs)
        if step(world, scheduler, job):
            jobs.remove(job)
    assert not jobs
    assert world.finished == {run.id: len(run.stages) for run in world.plan.runs}
    assert set(world.trainings.values()) == {1}
    assert set(world.scorings.values()) == {1}


@given(plans, st.integers(1, 4), st.integers(0, 2), st.randoms(use_true_random=False))
@settings(max_examples=500, deadline=None)
def test_deaths_and_failures_stop_nobody_else(runs, slots, retries, chance):
    world = World(plan_of(runs))
    scheduler = Scheduler(
        world.plan, {}, world.trained.__contains__, world.scored.__contains__, retries
    )
    jobs, failed, deaths = [], set(), Counter()
    for _ in range(10_000):
        if scheduler.over:
            break
        begin(world, scheduler, jobs, slots, failed)
        assert jobs, "nobody works and not all is done"
        # Nothing is trained by two at a time, whoever has died or failed before.
        for kind, there in zip(under_way(jobs), (world.trained, world.scored), strict=True):
            assert all(count == 1 for key, count in kind.items() if key not in there)
        job = chance.choice(jobs)
        fate = chance.random()
        if fate < 0.1:
            jobs.remove(job)
            deaths[job.run.id] += 1
            if not scheduler.dies(job.run.id):
                failed.add(job.run.id)
        elif fate < 0.13:
            jobs.remove(job)
            scheduler.fails(job.run.id)
            failed.add(job.run.id)
        else:
            before = job.at
            if step(world, scheduler, job):
                jobs.remove(job)
            if job.at > before:
                deaths[job.run.id] = 0
        assert all(count <= retries + 1 for count in deaths.values())
    assert scheduler.over
    assert not jobs
    for run in world.plan.runs:
        assert (run.id in failed) or world.finished[run.id] == len(run.stages)


@given(plans, st.data())
@settings(max_examples=200, deadline=None)
def test_going_on_where_an_earlier_call_stopped(runs, data):
    """Any stages finished, any of what they brought lost from the store or kept."""
    plan = plan_of(runs)
    world = World(plan)
    for run in plan.runs:
        world.finished[run.id] = data.draw(st.integers(0, len(run.stages)))
        for stage in run.stages[: world.finished[run.id]]:
            if data.draw(st.booleans()):
                world.trained.add(stage.trained)
            if data.draw(st.booleans()):
                world.scored.add(stage.deployed)
    scheduler = Scheduler(
        plan, dict(world.finished), world.trained.__contains__, world.scored.__contains__
    )
    jobs = []
    while not scheduler.over:
        begin(world, scheduler, jobs, 3)
        assert jobs
        if step(world, scheduler, jobs[0]):
            jobs.pop(0)
        jobs = jobs[1:] + jobs[:1]
    assert world.finished == {run.id: len(run.stages) for run in plan.runs}
    assert all(count == 1 for count in world.trainings.values())


def test_owners_first_then_the_longest():
    """The second run trains what the third waits for; the others wait for nobody."""
    plan = plan_of([
        [("short", "short")],
        [("0s", "0s"), ("1a", "1a")],
        [("0s", "0s"), ("1b", "1b")],
        [("0l", "0l"), ("1l", "1l"), ("2l", "2l")],
    ])  # fmt: skip
    there = set()
    scheduler = Scheduler(plan, {}, there.__contains__, there.__contains__)
    assert scheduler.next()[0].id == "run1"  # run2 waits for it
    assert scheduler.next()[0].id == "run3"
    assert scheduler.next()[0].id == "run0"
    assert scheduler.next() is None
    there.add("0s")
    scheduler.stage_ends("run1", 0)
    assert scheduler.next()[0].id == "run2"


def test_a_run_does_what_it_can_if_there_is_nothing_better():
    plan = plan_of([
        [("0a", "0a"), ("1s", "1s")],
        [("0b", "0b"), ("1s", "1s")],
    ])  # fmt: skip
    there = set()
    scheduler = Scheduler(plan, {}, there.__contains__, there.__contains__)
    assert [(run.id, until) for run, until in (scheduler.next(), scheduler.next())] == [
        ("run0", 2),
        ("run1", 1),
    ]
    scheduler.stage_ends("run1", 0)
    scheduler.job_ends("run1")
    assert scheduler.next() is None
    scheduler.stage_ends("run0", 0)
    there.add("1s")
    scheduler.stage_ends("run0", 1)
    run, until = scheduler.next()
    assert (run.id, until) == ("run1", 2)
