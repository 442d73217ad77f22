/** Whether and where a sequence gets its pages: a new prompt's, or those of a preempted sequence that returns. */
import { PageTable } from '../../kv/page_table.js';
import { isSafe, type PageClaim } from '../../kv/page_claims.js';
import type { PageSpace } from '../../kv/page_space.js';
import { choiceClaim, landingClaims, type PagePolicy } from './batch.js';
import type { Choice } from './choice.js';
import type { Job } from './job.js';

export interface AdmissionInput {
  space: PageSpace;
  policy: PagePolicy;
  /** Sequences that hold pages. */
  holding: readonly Choice[];
  landing: readonly Job[];
}

/** Pages for a waiting request's prompt, its cached prefix shared; null while there are too few. Sets job.table and job.cachedTokens. */
export function admitPrompt(job: Job, input: AdmissionInput): boolean {
  const { space } = input;
  const tokens = job.request.tokens.length;
  for (const home of homesByMerit(job.ids, space)) {
    const cached = space.cachedPrefix(job.ids, home);
    const table = takePages(job.ids.slice(0, cached), tokens, home, space);
    if (!table) continue;
    job.table = table;
    job.cachedTokens = cached * space.pageTokens;
    if (leavesRoom(job.request.n, input) && staysSafe(input, landingClaims(job))) return true;
    job.table = null;
    table.release();
  }
  return false;
}

/** Pages for a parked sequence, as many as it had. Sets choice.table, and choice.computed to what the worker's own cache held. */
export function readmit(choice: Choice, input: AdmissionInput): boolean {
  const { space } = input;
  const { job, table: former, computed: parked } = choice;
  for (const home of homesByMerit(job.ids, space)) {
    const cached = space.cachedPrefix(job.ids, home);
    const table = takePages(job.ids.slice(0, cached), choice.tokens.length, home, space);
    if (!table) continue;
    choice.table = table;
    choice.computed = cached * space.pageTokens;
    if (leavesRoom(1, input) && staysSafe(input, [choiceClaim(choice)])) return true;
    choice.table = former;
    choice.computed = parked;
    table.release();
  }
  return false;
}

/** The blocks `cached`, which are here, then new pages up to `tokens`; null where pages do not suffice. */
function takePages(cached: readonly string[], tokens: number, home: number, space: PageSpace): PageTable | null {
  const table = new PageTable(space, home);
  for (const id of cached) table.adopt(id);
  const need = space.spread(cached.length, space.pagesFor(tokens), home);
  if (need.every((count, lane) => count <= space.lanes[lane]!.available)) {
    table.grow(tokens);
    return table;
  }
  table.release();
  return null;
}

/** Of a dp worker the rank that holds most of the prefix, then the one with most room. */
function homesByMerit(ids: readonly string[], space: PageSpace): number[] {
  const homes = Array.from({ length: space.homes }, (_, home) => ({ home, cached: space.cachedPrefix(ids, home), available: space.lanes[home]!.available }));
  return homes.sort((a, b) => b.cached - a.cached || b.available - a.available).map(({ home }) => home);
}

/** With preemption, a page for everybody's next step stays free, so that who enters does not push another out at once. */
function leavesRoom(choices: number, { space, policy, holding, landing }: AdmissionInput): boolean {
  if (policy === 'avoid' || (holding.length === 0 && landing.length === 0)) return true;
  const wanted = holding.length + landing.reduce((sum, { request }) => sum + request.n, 0) + choices;
  return space.available.reduce((sum, available) => sum + available, 0) >= wanted;
}

function staysSafe({ space, policy, holding, landing }: AdmissionInput, added: PageClaim[]): boolean {
  if (policy === 'preempt') return true;
  return isSafe(space.available, [...holding.map(choiceClaim), ...landing.flatMap(landingClaims), ...added]);
}
