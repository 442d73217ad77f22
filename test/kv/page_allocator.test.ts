import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { PageAllocator } from '../../src/kv/page_allocator.js';

const hasCode = (code: string) => (error: unknown) => (error as { code?: string }).code === code;

test('gives every page once, then says NO_PAGES', () => {
  const pages = new PageAllocator(4);
  const given = [pages.allocate(), pages.allocate(), pages.allocate(), pages.allocate()];
  assert.is(new Set(given).size, 4);
  assert.equal(pages.counts, { total: 4, used: 4, cached: 0 });
  assert.throws(() => pages.allocate(), hasCode('NO_PAGES'));
  given.forEach((page) => pages.release(page));
  assert.equal(pages.counts, { total: 4, used: 0, cached: 0 });
  assert.equal(pages.check(), []);
});

test('a page comes back with its last reference', () => {
  const pages = new PageAllocator(1);
  const page = pages.allocate();
  pages.retain(page);
  pages.release(page);
  assert.is(pages.counts.used, 1);
  pages.release(page);
  assert.is(pages.counts.used, 0);
  assert.throws(() => pages.release(page), /more often than retained/);
  assert.equal(pages.check(), []);
});

test('a published page stays cached, is found, and is evicted oldest first when pages run out', () => {
  const pages = new PageAllocator(3);
  const [a, b, c] = [pages.allocate(), pages.allocate(), pages.allocate()];
  pages.publish(a, 'a');
  pages.publish(b, 'b');
  pages.release(b);
  pages.release(a);
  pages.release(c);
  assert.equal(pages.counts, { total: 3, used: 0, cached: 2 });
  assert.is(pages.find('a'), a);
  pages.retain(b);
  pages.release(b);
  assert.is(pages.allocate(), c);
  assert.is(pages.allocate(), a);
  assert.is(pages.find('a'), undefined);
  assert.is(pages.find('b'), b);
  assert.equal(pages.check(), []);
});

test('a block that is known already keeps its first page', () => {
  const pages = new PageAllocator(2);
  const [first, second] = [pages.allocate(), pages.allocate()];
  assert.is(pages.publish(first, 'x'), first);
  assert.is(pages.publish(second, 'x'), first);
  pages.release(second);
  assert.equal(pages.counts, { total: 2, used: 1, cached: 0 });
  assert.ok(pages.isPublished(first));
  assert.not.ok(pages.isPublished(second));
  assert.throws(() => pages.publish(first, 'y'), /holds block x/);
});

test('ids are listed in order of use', () => {
  const pages = new PageAllocator(3);
  for (const id of ['a', 'b', 'c']) {
    const page = pages.allocate();
    pages.publish(page, id);
    pages.release(page);
  }
  pages.retain(pages.find('a')!);
  assert.equal([...pages.ids()], ['b', 'c', 'a']);
});

test('a random history never loses or doubles a page', () => {
  let state = 12345;
  const random = (below: number) => { state = (Math.imul(state, 1103515245) + 12345) >>> 0; return (state >>> 8) % below; };
  const pages = new PageAllocator(16);
  const held: number[] = [];
  for (let step = 0; step < 20_000; step++) {
    const action = random(4);
    if (action === 0 && pages.available > 0) held.push(pages.allocate());
    else if (action === 1 && held.length > 0) pages.release(held.splice(random(held.length), 1)[0]!);
    else if (action === 2 && held.length > 0) {
      const page = held[random(held.length)]!;
      if (!pages.isPublished(page)) pages.publish(page, `block ${random(40)}`);
    }
    else if (action === 3) {
      const page = pages.find(`block ${random(40)}`);
      if (page !== undefined) { pages.retain(page); held.push(page); }
    }
    assert.is(pages.counts.used, new Set(held).size);
    if (step % 100 === 0) assert.equal(pages.check(), []);
  }
  held.forEach((page) => pages.release(page));
  assert.is(pages.counts.used, 0);
  assert.equal(pages.check(), []);
});

test.run();
