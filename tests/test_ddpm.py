"""Diffusion against the schedulers of `diffusers`, an implementation of the same
papers by other people, and laws it must obey."""
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hyperclip_nb.language.ddpm import (
    Schedule, add_noise, diffusion_loss, linear_schedule, posterior, sample_ddim,
    sample_ddpm, sample_dpm, split_prediction, timesteps, v_target,
)

KINDS = {'eps': 'epsilon', 'v': 'v_prediction'}
exact = linear_schedule(dtype=torch.float64)
assert_close = torch.testing.assert_close


def seed(n):
    return torch.Generator().manual_seed(n)


def randn(*size, s, dtype=torch.float64):
    return torch.randn(*size, generator=seed(s), dtype=dtype)


def diffusers():
    "The library that we are checked against"
    return pytest.importorskip('diffusers')


def scheduler(cls, kind, schedule=exact, double=True, **kwargs):
    "A scheduler of diffusers with our betas; its own are rounded to 32 bits"
    s = cls(
        len(schedule), trained_betas=schedule.beta.tolist(),
        prediction_type=KINDS[kind], timestep_spacing='trailing', **kwargs,
    )
    if double:
        s.betas = torch.tensor(schedule.beta.tolist(), dtype=torch.float64)
        s.alphas = 1 - s.betas
        s.alphas_cumprod = s.alphas.cumprod(0)
    return s


def ddpm(kind, **kwargs):
    DDPMScheduler = diffusers().DDPMScheduler
    options = dict(variance_type='fixed_small', clip_sample=False)
    return scheduler(DDPMScheduler, kind, **options, **kwargs)


def ddim(kind, **kwargs):
    DDIMScheduler = diffusers().DDIMScheduler
    options = dict(set_alpha_to_one=True, clip_sample=False)
    s = scheduler(DDIMScheduler, kind, **options, **kwargs)
    s.final_alpha_cumprod = torch.tensor(1., dtype=s.alphas_cumprod.dtype)
    return s


def network(width=3, dtype=torch.float64):
    "A smooth function of point and step that has learnt nothing"
    w = randn(width, width, s=1).to(dtype)

    def model(x, t):
        return torch.tanh(x@w + t[:, None].to(dtype)/350)
    return model


class Recorder:
    "A model that keeps what it is shown: the state of a sampler at every step"
    def __init__(self, model):
        self.model = model
        self.x, self.t = [], []

    def __call__(self, x, t):
        self.x.append(x)
        self.t.append(t)
        return self.model(x, t)


# -- the schedule and the forward process

def test_paper_schedule():
    s = linear_schedule()
    assert len(s) == 350 and s.beta.dtype == s.signal.dtype == torch.float32
    assert_close(s.beta[[0, -1]], torch.tensor([1e-4, .06]))
    assert s.signal[-1] < .005


def test_schedule_matches_diffusers():
    theirs = ddpm('eps', double=False)
    ours = linear_schedule()
    assert_close(ours.beta, theirs.betas)
    assert_close(ours.alpha_bar, theirs.alphas_cumprod, rtol=1e-4, atol=0)


def test_float32_is_the_rounded_double():
    single = linear_schedule()
    for name in ('beta', 'alpha', 'alpha_bar', 'signal', 'noise'):
        rounded = getattr(exact, name).float()
        assert_close(getattr(single, name), rounded, rtol=0, atol=0)


@pytest.mark.parametrize('shape', [(350, 3), (350, 2, 4), (350,)])
def test_add_noise_and_velocity_match_diffusers(shape):
    x0, eps = randn(2, *shape, s=0)
    t = torch.arange(350).flip(0)
    theirs = ddpm('v')
    xt, their_xt = add_noise(x0, t, eps, exact), theirs.add_noise(x0, eps, t)
    assert_close(xt, their_xt, rtol=1e-12, atol=1e-12)
    v, their_v = v_target(x0, eps, t, exact), theirs.get_velocity(x0, eps, t)
    assert_close(v, their_v, rtol=1e-12, atol=1e-12)


def test_posterior_variance_matches_diffusers():
    theirs = ddpm('eps')
    z = torch.zeros(350, 1, dtype=torch.float64)
    _, var = posterior(z, z, torch.arange(350), exact)
    assert var[0] == 0 # diffusers clamps it to 1e-20 here, and adds no noise
    their_var = torch.stack([theirs._get_variance(t) for t in range(1, 350)])
    assert_close(var[1:, 0], their_var, rtol=1e-9, atol=0)


# -- the samplers, step by step

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('dtype,tol', [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_ddpm_loop_matches_diffusers(kind, dtype, tol):
    model, theirs = network(dtype=dtype), ddpm(kind, double=dtype == torch.float64)
    start = randn(16, 3, s=2, dtype=dtype)
    ours = Recorder(model)
    end = sample_ddpm(ours, start, linear_schedule(dtype=dtype), kind, seed(3))

    x, generator = start, seed(3)
    for i, t in enumerate(theirs.timesteps):
        assert_close(ours.x[i], x, rtol=tol, atol=tol)
        assert (ours.t[i] == t).all()
        assert ours.t[i].shape == (16,) and ours.t[i].dtype == torch.long
        pred = model(x, t.expand(16))
        x = theirs.step(pred, t, x, generator=generator).prev_sample
    assert len(ours.x) == 350
    assert_close(end, x, rtol=tol, atol=tol)


@pytest.mark.parametrize('kind', KINDS)
# numbers that divide 350; with others diffusers' idea of the step before is off
@pytest.mark.parametrize('steps', [1, 2, 7, 25, 175, 350])
def test_ddim_loop_matches_diffusers(kind, steps):
    model, theirs = network(), ddim(kind)
    theirs.set_timesteps(steps)
    start = randn(16, 3, s=4)
    ours = Recorder(model)
    end = sample_ddim(ours, start, exact, kind, steps)

    x = start
    for i, t in enumerate(theirs.timesteps):
        assert_close(ours.x[i], x, rtol=1e-9, atol=1e-9)
        assert (ours.t[i] == t).all()
        x = theirs.step(model(x, t.expand(16)), int(t), x).prev_sample
    assert len(ours.x) == steps
    assert_close(end, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('steps', [2, 3, 7, 14, 25, 50])
def test_dpm_loop_matches_diffusers(kind, steps):
    DPMSolverMultistepScheduler = diffusers().DPMSolverMultistepScheduler
    options = dict(algorithm_type='dpmsolver++', solver_order=2)
    options |= dict(solver_type='midpoint', final_sigmas_type='zero')
    theirs = scheduler(DPMSolverMultistepScheduler, kind, double=False, **options)
    theirs.set_timesteps(steps)
    model, start = network(), randn(16, 3, s=4)
    ours = Recorder(model)
    end = sample_dpm(ours, start, exact, kind, steps)
    x = start
    for i, t in enumerate(theirs.timesteps):
        assert (ours.t[i] == t).all()
        # their schedule is rounded to 32 bits
        assert_close(ours.x[i], x, rtol=2e-3, atol=2e-3)
        x = theirs.step(model(x, t.expand(16)), t, x).prev_sample
    assert_close(end, x, rtol=2e-3, atol=2e-3)


def test_dpm_of_a_guess_that_stays_is_exact():
    x0, start = randn(16, 3, s=5), randn(16, 3, s=6)

    def model(x, t):
        "It always sees the same data"
        return (x - exact.signal[t][:, None]*x0)/exact.noise[t][:, None]

    for sampler in (sample_dpm, sample_ddim):
        for steps in (1, 2, 9):
            assert_close(sampler(model, start, exact, 'eps', steps), x0)


@pytest.mark.parametrize('steps', [1, 3, 7, 25, 50, 99, 100, 349, 350])
def test_timesteps_match_diffusers(steps):
    theirs = ddim('eps')
    theirs.set_timesteps(steps)
    assert timesteps(exact, steps).tolist() == theirs.timesteps.tolist()


# -- laws

betas = st.lists(st.floats(1e-5, .5), min_size=1, max_size=60)
schedules = betas.map(lambda beta: Schedule(beta, torch.float64))
numbers = st.integers(0, 2**31 - 1)
shapes = st.sampled_from([(5,), (5, 3), (5, 2, 4)])


@settings(max_examples=50, deadline=None)
@given(schedules)
def test_alpha_bar_falls_and_the_posterior_is_narrower_than_the_step(s):
    assert (s.alpha_bar.diff() < 0).all() and 0 < s.alpha_bar[-1] and s.alpha_bar[0] < 1
    z = torch.zeros(len(s), 1, dtype=torch.float64)
    _, var = posterior(z, z, torch.arange(len(s)), s)
    assert (0 <= var).all() and (var[:, 0] <= s.beta).all()


@settings(max_examples=50, deadline=None)
@given(schedules, numbers)
def test_variance_stays_one(s, n):
    assert_close(s.signal**2 + s.noise**2, torch.ones(len(s), dtype=torch.float64))
    generator, size = seed(n), 20_000
    x0, eps = torch.randn(2, size, generator=generator, dtype=torch.float64)
    t = torch.randint(len(s), (1,), generator=generator).expand(size)
    assert abs(add_noise(x0, t, eps, s).var() - 1) < 6*(2/size)**.5


@settings(max_examples=50, deadline=None)
@given(schedules, numbers, st.sampled_from(list(KINDS)), shapes)
def test_the_true_prediction_gives_back_data_and_noise(s, n, kind, shape):
    generator = seed(n)
    x0, eps = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    t = torch.randint(len(s), (5,), generator=generator)
    pred = eps if kind == 'eps' else v_target(x0, eps, t, s)
    xt = add_noise(x0, t, eps, s)
    x0_hat, eps_hat = split_prediction(pred, xt, t, s, kind)
    tol = 1e-12/s.signal[-1].item()
    assert_close(x0_hat, x0, rtol=tol, atol=tol)
    assert_close(eps_hat, eps, rtol=1e-9, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(schedules, numbers)
def test_samplers_find_a_single_point(s, n):
    "The perfect denoiser of one point leads any start back to it, by either sampler"
    generator = seed(n)
    point, x = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64)

    def model(x, t):
        return (x - s.signal[t, None]*point)/s.noise[t, None]

    steps = int(torch.randint(1, len(s) + 1, (1,), generator=generator))
    tol = 1e-10/s.signal[-1].item()
    by_ddpm = sample_ddpm(model, x, s, 'eps', generator)
    assert_close(by_ddpm, point, rtol=tol, atol=tol)
    by_ddim = sample_ddim(model, x, s, 'eps', steps)
    assert_close(by_ddim, point, rtol=tol, atol=tol)


def test_posterior_inverts_the_forward_process():
    """q(x^{t-1}|x^t,x^0) applied to x^t ~ q(x^t|x^0) gives q(x^{t-1}|x^0): mean and
    variance, in closed form"""
    t = torch.arange(1, 350)
    one = torch.ones(349, 1, dtype=torch.float64)
    of_x0, _ = posterior(one, 0*one, t, exact)
    of_xt, var = posterior(0*one, one, t, exact)
    signal = of_x0 + of_xt*exact.signal[t, None]
    noise_var = of_xt**2*exact.noise[t, None]**2 + var
    assert_close(signal[:, 0], exact.signal[:-1])
    assert_close(noise_var[:, 0], exact.noise[:-1]**2)


# -- the loss, and what is refused

def test_loss_is_the_error_of_the_prediction():
    "Replays the generator's draws: steps first, then noise"
    s = linear_schedule()
    x0 = randn(64, 3, s=5, dtype=torch.float32)
    e = randn(64, 2, s=6, dtype=torch.float32)
    generator = seed(7)
    t = torch.randint(350, (64,), generator=generator)
    eps = torch.randn(64, 3, generator=generator)

    def silent(xt, asked_t, asked_e):
        assert torch.equal(asked_t, t) and asked_e is e
        assert_close(xt, add_noise(x0, t, eps, s))
        return torch.zeros_like(xt)

    for kind, target in (('eps', eps), ('v', v_target(x0, eps, t, s))):
        loss = diffusion_loss(silent, x0, s, kind, seed(7), e)
        assert_close(loss, target.square().mean())


def test_the_loss_and_ddim_reach_the_network_and_ddpm_keeps_no_graph():
    net = torch.nn.Linear(3, 3)

    def model(x, t):
        return net(x)

    diffusion_loss(model, torch.randn(8, 3), linear_schedule(), 'v', seed(0)).backward()
    assert net.weight.grad.abs().sum() > 0
    net.zero_grad()
    x, s = torch.randn(2, 3), linear_schedule(10)
    assert not sample_ddpm(model, x, s, 'v', seed(0)).requires_grad
    sample_ddim(model, x, s, 'v', 5).sum().backward()
    assert net.weight.grad.abs().sum() > 0


IMPOSSIBLE_BETAS = [[], [0.], [1.], [.1, -.1], [float('nan')], [[.1, .2]]]


@pytest.mark.parametrize('beta', IMPOSSIBLE_BETAS)
def test_impossible_betas_are_refused(beta):
    with pytest.raises(ValueError, match='between 0 and 1'):
        Schedule(beta)


@pytest.mark.parametrize('steps', [0, -1, 351])
def test_impossible_numbers_of_steps_are_refused(steps):
    with pytest.raises(ValueError, match='from 1 to 350'):
        timesteps(linear_schedule(), steps)


def identity(x, t):
    return x


def test_unknown_kinds_are_refused():
    x, s = torch.zeros(2, 3), linear_schedule(5)
    refused = pytest.raises(ValueError, match="'eps' or 'v', got 'noise'")
    with refused:
        split_prediction(x, x, torch.zeros(2).long(), s, 'noise')
    with refused:
        diffusion_loss(identity, x, s, 'noise', seed(0))
    with refused:
        sample_ddim(identity, x, s, 'noise', 2)


def test_predictions_of_another_shape_are_refused():
    x, s = torch.zeros(2, 3), linear_schedule(5)
    with pytest.raises(ValueError, match=r'shape \(2, 3\)'):
        diffusion_loss(lambda x, t: x[:, :1], x, s, 'eps', seed(0))
