"Diffusion against the schedulers of `diffusers`, an implementation of the same papers by other people, and laws it must obey."
import pytest, torch
from hypothesis import given, settings, strategies as st
from hyperclip_nb.language.ddpm import (
    Schedule, add_noise, diffusion_loss, linear_schedule, posterior, sample_ddim,
    sample_ddpm, sample_dpm, split_prediction, timesteps, v_target,
)

KINDS = {'eps': 'epsilon', 'v': 'v_prediction'}
exact = linear_schedule(dtype=torch.float64)


def seed(n): return torch.Generator().manual_seed(n)


def scheduler(cls, kind, schedule=exact, double=True, **kwargs):
    "A scheduler of diffusers with our betas, in double precision if asked (its own are rounded to 32 bits)"
    s = cls(len(schedule), trained_betas=schedule.beta.tolist(), prediction_type=KINDS[kind],
            timestep_spacing='trailing', **kwargs)
    if double:
        s.betas = torch.tensor(schedule.beta.tolist(), dtype=torch.float64)
        s.alphas = 1-s.betas
        s.alphas_cumprod = s.alphas.cumprod(0)
    return s


def ddpm(kind, **kwargs):
    from diffusers import DDPMScheduler
    return scheduler(DDPMScheduler, kind, variance_type='fixed_small', clip_sample=False, **kwargs)


def ddim(kind, **kwargs):
    from diffusers import DDIMScheduler
    s = scheduler(DDIMScheduler, kind, set_alpha_to_one=True, clip_sample=False, **kwargs)
    s.final_alpha_cumprod = torch.tensor(1., dtype=s.alphas_cumprod.dtype)
    return s


def network(width=3, dtype=torch.float64):
    "A smooth function of point and step that has learnt nothing"
    w = torch.randn(width, width, generator=seed(1), dtype=torch.float64).to(dtype)
    return lambda x, t: torch.tanh(x@w + t[:, None].to(dtype)/350)


class Seen:
    "A model that keeps what it is shown: the state of a sampler at every step"
    def __init__(self, model): self.model, self.x, self.t = model, [], []

    def __call__(self, x, t):
        self.x.append(x)
        self.t.append(t)
        return self.model(x, t)


# -- the schedule and the forward process ------------------------------------------------------------------------------

def test_paper_schedule():
    s = linear_schedule()
    assert len(s) == 350 and s.beta.dtype == s.signal.dtype == torch.float32
    torch.testing.assert_close(s.beta[[0, -1]], torch.tensor([1e-4, .06]))
    assert s.signal[-1] < .005


def test_schedule_matches_diffusers():
    theirs = ddpm('eps', double=False)
    ours = linear_schedule()
    torch.testing.assert_close(ours.beta, theirs.betas)
    torch.testing.assert_close(ours.alpha_bar, theirs.alphas_cumprod, rtol=1e-4, atol=0)


def test_float32_is_the_rounded_double():
    single = linear_schedule()
    for name in ('beta', 'alpha', 'alpha_bar', 'signal', 'noise'):
        torch.testing.assert_close(getattr(single, name), getattr(exact, name).float(), rtol=0, atol=0)


@pytest.mark.parametrize('shape', [(350, 3), (350, 2, 4), (350,)])
def test_add_noise_and_velocity_match_diffusers(shape):
    x0, eps = torch.randn(2, *shape, generator=seed(0), dtype=torch.float64)
    t = torch.arange(350).flip(0)
    theirs = ddpm('v')
    torch.testing.assert_close(add_noise(x0, t, eps, exact), theirs.add_noise(x0, eps, t), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(v_target(x0, eps, t, exact), theirs.get_velocity(x0, eps, t), rtol=1e-12, atol=1e-12)


def test_posterior_variance_matches_diffusers():
    theirs = ddpm('eps')
    z = torch.zeros(350, 1, dtype=torch.float64)
    _, var = posterior(z, z, torch.arange(350), exact)
    assert var[0] == 0   # diffusers clamps it to 1e-20 here, and adds no noise at this step
    torch.testing.assert_close(var[1:, 0], torch.stack([theirs._get_variance(t) for t in range(1, 350)]), rtol=1e-9, atol=0)


# -- the samplers, step by step ----------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('dtype,tol', [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_ddpm_loop_matches_diffusers(kind, dtype, tol):
    model, theirs = network(dtype=dtype), ddpm(kind, double=dtype==torch.float64)
    start = torch.randn(16, 3, generator=seed(2), dtype=dtype)
    ours = Seen(model)
    end = sample_ddpm(ours, start, linear_schedule(dtype=dtype), kind, seed(3))

    x, g = start, seed(3)
    for i, t in enumerate(theirs.timesteps):
        torch.testing.assert_close(ours.x[i], x, rtol=tol, atol=tol)
        assert (ours.t[i] == t).all() and ours.t[i].shape == (16,) and ours.t[i].dtype == torch.long
        x = theirs.step(model(x, t.expand(16)), t, x, generator=g).prev_sample
    assert len(ours.x) == 350
    torch.testing.assert_close(end, x, rtol=tol, atol=tol)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('steps', [1, 2, 7, 25, 175, 350])   # others do not divide 350, and diffusers' idea of the step before is then off
def test_ddim_loop_matches_diffusers(kind, steps):
    model, theirs = network(), ddim(kind)
    theirs.set_timesteps(steps)
    start = torch.randn(16, 3, generator=seed(4), dtype=torch.float64)
    ours = Seen(model)
    end = sample_ddim(ours, start, exact, kind, steps)

    x = start
    for i, t in enumerate(theirs.timesteps):
        torch.testing.assert_close(ours.x[i], x, rtol=1e-9, atol=1e-9)
        assert (ours.t[i] == t).all()
        x = theirs.step(model(x, t.expand(16)), int(t), x).prev_sample
    assert len(ours.x) == steps
    torch.testing.assert_close(end, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('steps', [2, 3, 7, 14, 25, 50])
def test_dpm_loop_matches_diffusers(kind, steps):
    from diffusers import DPMSolverMultistepScheduler
    theirs = scheduler(DPMSolverMultistepScheduler, kind, double=False, algorithm_type='dpmsolver++', solver_order=2, solver_type='midpoint', final_sigmas_type='zero')
    theirs.set_timesteps(steps)
    model, start = network(), torch.randn(16, 3, generator=seed(4), dtype=torch.float64)
    ours = Seen(model); end = sample_dpm(ours, start, exact, kind, steps)
    x = start
    for i, t in enumerate(theirs.timesteps):
        assert (ours.t[i] == t).all()
        torch.testing.assert_close(ours.x[i], x, rtol=2e-3, atol=2e-3)               # their schedule is rounded to 32 bits
        x = theirs.step(model(x, t.expand(16)), t, x).prev_sample
    torch.testing.assert_close(end, x, rtol=2e-3, atol=2e-3)


def test_dpm_of_a_guess_that_stays_is_exact():
    x0, start = torch.randn(16, 3, generator=seed(5), dtype=torch.float64), torch.randn(16, 3, generator=seed(6), dtype=torch.float64)
    model = lambda x, t: (x - exact.signal[t][:, None]*x0)/exact.noise[t][:, None]   # it always sees the same data
    for sampler in (sample_dpm, sample_ddim):
        for steps in (1, 2, 9): torch.testing.assert_close(sampler(model, start, exact, 'eps', steps), x0)


@pytest.mark.parametrize('steps', [1, 3, 7, 25, 50, 99, 100, 349, 350])
def test_timesteps_match_diffusers(steps):
    theirs = ddim('eps')
    theirs.set_timesteps(steps)
    assert timesteps(exact, steps).tolist() == theirs.timesteps.tolist()


# -- laws --------------------------------------------------------------------------------------------------------------

schedules = st.lists(st.floats(1e-5, .5), min_size=1, max_size=60).map(lambda b: Schedule(b, torch.float64))
numbers = st.integers(0, 2**31-1)


@settings(max_examples=50, deadline=None)
@given(schedules)
def test_alpha_bar_falls_and_the_posterior_is_narrower_than_the_step(s):
    assert (s.alpha_bar.diff() < 0).all() and 0 < s.alpha_bar[-1] and s.alpha_bar[0] < 1
    z = torch.zeros(len(s), 1, dtype=torch.float64)
    var = posterior(z, z, torch.arange(len(s)), s)[1][:, 0]
    assert (0 <= var).all() and (var <= s.beta).all()


@settings(max_examples=50, deadline=None)
@given(schedules, numbers)
def test_variance_stays_one(s, n):
    torch.testing.assert_close(s.signal**2 + s.noise**2, torch.ones(len(s), dtype=torch.float64))
    g = seed(n)
    x0, eps = torch.randn(2, 20_000, generator=g, dtype=torch.float64)
    t = torch.randint(len(s), (1,), generator=g).expand(20_000)
    assert abs(add_noise(x0, t, eps, s).var()-1) < 6*(2/20_000)**.5


@settings(max_examples=50, deadline=None)
@given(schedules, numbers, st.sampled_from(list(KINDS)), st.sampled_from([(5,), (5, 3), (5, 2, 4)]))
def test_the_true_prediction_gives_back_data_and_noise(s, n, kind, shape):
    g = seed(n)
    x0, eps = torch.randn(2, *shape, generator=g, dtype=torch.float64)
    t = torch.randint(len(s), (5,), generator=g)
    pred = eps if kind == 'eps' else v_target(x0, eps, t, s)
    got = split_prediction(pred, add_noise(x0, t, eps, s), t, s, kind)
    tol = 1e-12/s.signal[-1].item()
    torch.testing.assert_close(got[0], x0, rtol=tol, atol=tol)
    torch.testing.assert_close(got[1], eps, rtol=1e-9, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(schedules, numbers)
def test_samplers_find_a_single_point(s, n):
    "The perfect denoiser of one point leads any start back to it, by either sampler"
    g = seed(n)
    point, x = torch.randn(2, 4, 3, generator=g, dtype=torch.float64)

    def model(x, t): return (x - s.signal[t, None]*point)/s.noise[t, None]
    steps = int(torch.randint(1, len(s)+1, (1,), generator=g))
    tol = 1e-10/s.signal[-1].item()
    torch.testing.assert_close(sample_ddpm(model, x, s, 'eps', g), point, rtol=tol, atol=tol)
    torch.testing.assert_close(sample_ddim(model, x, s, 'eps', steps), point, rtol=tol, atol=tol)


def test_posterior_inverts_the_forward_process():
    "q(x^{t-1}|x^t,x^0) applied to x^t ~ q(x^t|x^0) gives q(x^{t-1}|x^0): mean and variance, in closed form"
    t = torch.arange(1, 350)
    one, zero = torch.ones(349, 1, dtype=torch.float64), torch.zeros(349, 1, dtype=torch.float64)
    of_x0, _ = posterior(one, zero, t, exact)
    of_xt, var = posterior(zero, one, t, exact)
    torch.testing.assert_close((of_x0 + of_xt*exact.signal[t, None])[:, 0], exact.signal[:-1])
    torch.testing.assert_close((of_xt**2*exact.noise[t, None]**2 + var)[:, 0], exact.noise[:-1]**2)


# -- the loss, and what is refused -------------------------------------------------------------------------------------

def test_loss_is_the_error_of_the_prediction():
    "Replays the generator's draws: steps first, then noise"
    s, x0, e = linear_schedule(), torch.randn(64, 3, generator=seed(5)), torch.randn(64, 2, generator=seed(6))
    g = seed(7)
    t = torch.randint(350, (64,), generator=g)
    eps = torch.randn(64, 3, generator=g)

    def model(xt, t_, e_):
        assert torch.equal(t_, t) and e_ is e
        torch.testing.assert_close(xt, add_noise(x0, t, eps, s))
        return torch.zeros_like(xt)
    torch.testing.assert_close(diffusion_loss(model, x0, s, 'eps', seed(7), e), eps.square().mean())
    torch.testing.assert_close(diffusion_loss(model, x0, s, 'v', seed(7), e), v_target(x0, eps, t, s).square().mean())


def test_the_loss_and_ddim_reach_the_network_and_ddpm_keeps_no_graph():
    net = torch.nn.Linear(3, 3)
    diffusion_loss(lambda x, t: net(x), torch.randn(8, 3), linear_schedule(), 'v', seed(0)).backward()
    assert net.weight.grad.abs().sum() > 0
    x, s = torch.randn(2, 3), linear_schedule(10)
    assert not sample_ddpm(lambda x, t: net(x), x, s, 'v', seed(0)).requires_grad
    net.zero_grad(); sample_ddim(lambda x, t: net(x), x, s, 'v', 5).sum().backward()
    assert net.weight.grad.abs().sum() > 0


@pytest.mark.parametrize('beta', [[], [0.], [1.], [.1, -.1], [float('nan')], [[.1, .2]]])
def test_impossible_betas_are_refused(beta):
    with pytest.raises(ValueError, match='between 0 and 1'): Schedule(beta)


@pytest.mark.parametrize('steps', [0, -1, 351])
def test_impossible_numbers_of_steps_are_refused(steps):
    with pytest.raises(ValueError, match='from 1 to 350'): timesteps(linear_schedule(), steps)


def test_unknown_kinds_and_shapes_are_refused():
    x, s = torch.zeros(2, 3), linear_schedule(5)
    for use in (lambda: split_prediction(x, x, torch.zeros(2).long(), s, 'noise'),
                lambda: diffusion_loss(lambda x, t: x, x, s, 'noise', seed(0)),
                lambda: sample_ddim(lambda x, t: x, x, s, 'noise', 2)):
        with pytest.raises(ValueError, match="'eps' or 'v', got 'noise'"): use()
    with pytest.raises(ValueError, match=r'shape \(2, 3\)'): diffusion_loss(lambda x, t: x[:, :1], x, s, 'eps', seed(0))
