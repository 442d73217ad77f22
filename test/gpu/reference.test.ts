import { suite } from 'uvu';
import { Draw } from '../support/random.js';
import { LATENTS, mustBeRight, randomDecode, randomPrefill } from './problems.js';

const test = suite('the float64 reference on the GPU');

// The GPU's reference is what all other tests trust; here the plain loops of the CPU take its place over the same data.
test('kernels agree with the reference that the CPU computes, too', async () => {
  for (let seed = 1; seed <= 6; seed++) {
    for (const latent of LATENTS) {
      const problem = randomDecode(new Draw(seed), 'auto', latent);
      const small = { ...problem, kvLens: problem.kvLens.map((len) => len % 200).slice(0, 4), qLens: problem.qLens.slice(0, 4) };
      for (const reference of ['cpu', 'auto'] as const) await mustBeRight(small, { seed, repeats: 1, reference });
    }
    const problem = randomPrefill(new Draw(seed));
    const small = { ...problem, kvLens: problem.kvLens.map((len) => len % 200), qLens: problem.qLens.map((len) => len % 100) };
    for (const reference of ['cpu', 'auto'] as const) await mustBeRight(small, { seed, repeats: 1, reference });
  }
});

test.run();
