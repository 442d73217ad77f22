import { EigenvalueDecomposition, Matrix, QrDecomposition, inverse } from 'ml-matrix';
import { TplaError } from '../errors.js';
import type { Sensitivity } from '../native/reparam.js';
import { uniform } from '../random.js';

/**
 * A change of basis of the latent: c' = matrix · n, where n is the normalised latent without the norm's gain. Rows are ordered
 * [shared | slice 0 | … | slice g-1].
 */
export interface Basis {
  matrix: Matrix;
  inverse: Matrix;
  /** Then it commutes with the norm and is absorbed into W_DKV; else it is applied after the norm. */
  orthogonal: boolean;
}

export type BasisKind = 'identity' | 'hadamard' | 'pca' | 'aware' | 'aware-oblique';

export const CALIBRATED_BASES: readonly BasisKind[] = ['aware', 'aware-oblique', 'pca'];

export function identityBasis(size: number): Basis {
  return { matrix: Matrix.eye(size), inverse: Matrix.eye(size), orthogonal: true };
}

/** Random signs, then a Hadamard transform over the power of two in `size` and a cosine transform over what is left of it. */
export function hadamardBasis(size: number, seed: number): Basis {
  let power = 1;
  while (size % (power * 2) === 0) power *= 2;
  const rest = size / power;
  const random = uniform(seed);
  const signs = Array.from({ length: size }, () => (random() < 0.5 ? -1 : 1));
  const matrix = new Matrix(size, size);
  for (let i = 0; i < size; i++) {
    for (let j = 0; j < size; j++) {
      const hadamard = parity(Math.floor(i / rest) & Math.floor(j / rest)) ? -1 : 1;
      matrix.set(i, j, (signs[j]! * hadamard * cosine(i % rest, j % rest, rest)) / Math.sqrt(power));
    }
  }
  return { matrix, inverse: matrix.transpose(), orthogonal: true };
}

/** Principal components of the latents, strongest first. */
export function pcaBasis(covariance: Matrix): Basis {
  const matrix = eigenvectors(covariance).vectors.transpose();
  return { matrix, inverse: matrix.transpose(), orthogonal: true };
}

/** Directions below this part of the strongest are treated as noise when whitening. */
const VARIANCE_FLOOR = 1e-7;

/**
 * Directions ordered by what losing them costs the layer's output: how far latents vary along them under the model's own attention,
 * times how much logits (`key`) and values (`value`) depend on them. With Σ the covariance and G the dependence, the rows are
 * Vᵀ Σ^-½ for the eigenvectors V of Σ^½ G Σ^½: uncorrelated, of unit variance, the best nested sequence of subspaces for a linear
 * predictor. `oblique: false` gives each of `blocks` the same span as far as orthonormal rows allow (Gram-Schmidt in order).
 */
export function awareBasis(sensitivity: Sensitivity, size: number, options: { oblique: boolean; keyWeight: number }): Basis {
  const token = square(sensitivity.tokenCovariance, size);
  const attention = square(sensitivity.attentionCovariance, size);
  const covariance = Matrix.add(normalised(attention), normalised(token).mul(TOKEN_SHARE));
  const key = square(sensitivity.key, size).mul(options.keyWeight);
  const dependence = key.add(square(sensitivity.value, size));

  const { values, vectors } = eigenvectors(covariance);
  const floored = values.map((value) => Math.max(value, values[0]! * VARIANCE_FLOOR));
  const root = scaledColumns(vectors, floored.map(Math.sqrt)).mmul(vectors.transpose());
  const inverseRoot = scaledColumns(vectors, floored.map((value) => 1 / Math.sqrt(value))).mmul(vectors.transpose());
  const order = eigenvectors(root.mmul(dependence).mmul(root)).vectors;
  const matrix = order.transpose().mmul(inverseRoot);
  if (options.oblique) return { matrix, inverse: root.mmul(order), orthogonal: false };
  const orthonormal = new QrDecomposition(matrix.transpose()).orthogonalMatrix.transpose();
  return { matrix: orthonormal, inverse: orthonormal.transpose(), orthogonal: true };
}

/** Part of the plain token covariance in the one under attention, which may be blind to directions that attention ignores. */
const TOKEN_SHARE = 0.1;

/** Any invertible basis; throws when it is too skewed to be undone in the precision of a cache. */
export function freeBasis(matrix: Matrix): Basis {
  return { matrix, inverse: inverse(matrix), orthogonal: false };
}

/** Share of the latents' variance per rank slice, rows as in `Basis`. */
export function varianceShares(basis: Basis, covariance: Matrix, groups: number, shared: number): { shared: number; slices: number[] } {
  const variances = basis.matrix.mmul(covariance).mmul(basis.matrix.transpose()).diagonal();
  const total = variances.reduce((sum, value) => sum + value, 0);
  const part = (begin: number, end: number) => variances.slice(begin, end).reduce((sum, value) => sum + value, 0) / total;
  const width = (variances.length - shared) / groups;
  return { shared: part(0, shared), slices: Array.from({ length: groups }, (_, i) => part(shared + i * width, shared + (i + 1) * width)) };
}

// ---------------------------------------------------------------- linear algebra

/** Of a symmetric matrix, largest eigenvalue first; vectors are columns. */
export function eigenvectors(symmetric: Matrix): { values: number[]; vectors: Matrix } {
  const mean = Matrix.add(symmetric, symmetric.transpose()).mul(0.5);
  const decomposition = new EigenvalueDecomposition(mean, { assumeSymmetric: true });
  const values = decomposition.realEigenvalues;
  if (values.some((value) => !Number.isFinite(value))) throw new TplaError('INTERNAL', 'calibration gave numbers that are not finite');
  const order = values.map((_, i) => i).sort((a, b) => values[b]! - values[a]!);
  return { values: order.map((i) => values[i]!), vectors: decomposition.eigenvectorMatrix.subMatrixColumn(order) };
}

export function square(values: Float32Array, size: number): Matrix {
  return matrixOf(values, size, size);
}

export function matrixOf(values: ArrayLike<number>, rows: number, columns: number): Matrix {
  const matrix = new Matrix(rows, columns);
  for (let i = 0; i < rows; i++) for (let j = 0; j < columns; j++) matrix.set(i, j, values[i * columns + j]!);
  return matrix;
}

/** Rows [begin, end), row-major. */
export function rowsOf(matrix: Matrix, begin = 0, end = matrix.rows): Float32Array {
  const out = new Float32Array((end - begin) * matrix.columns);
  for (let i = begin; i < end; i++) for (let j = 0; j < matrix.columns; j++) out[(i - begin) * matrix.columns + j] = matrix.get(i, j);
  return out;
}

function normalised(matrix: Matrix): Matrix {
  return Matrix.mul(matrix, matrix.rows / matrix.trace());
}

function scaledColumns(matrix: Matrix, factors: number[]): Matrix {
  const out = matrix.clone();
  for (let i = 0; i < out.rows; i++) for (let j = 0; j < out.columns; j++) out.set(i, j, out.get(i, j) * factors[j]!);
  return out;
}

function cosine(i: number, j: number, size: number): number {
  return Math.sqrt((i === 0 ? 1 : 2) / size) * Math.cos((Math.PI * i * (2 * j + 1)) / (2 * size));
}

function parity(bits: number): boolean {
  let odd = false;
  for (; bits > 0; bits &= bits - 1) odd = !odd;
  return odd;
}
