import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { PageSpace } from '../../src/kv/page_space.js';
import { PageTable } from '../../src/kv/page_table.js';
import type { KvForm } from '../../src/native/types.js';

const space = (form: KvForm, ranks: number, pages: number) => new PageSpace({ form, ranks, pageTokens: 64 }, pages);
const noPages = (error: unknown) => (error as { code?: string }).code === 'NO_PAGES';

test('mla and tpla: one table for all ranks', () => {
  for (const form of ['mla', 'tpla'] as const) {
    const pages = space(form, 2, 8);
    const table = new PageTable(pages, 0);
    table.grow(130);
    assert.is(table.length, 3);
    assert.is(table.capacity, 192);
    assert.is(table.tables().length, 1);
    assert.is(table.tables()[0]!.length, 3);
    assert.is(table.rank, undefined);
    assert.is(pages.capacityTokens, 512);
    table.release();
    assert.equal(pages.counts, { total: 8, used: 0, cached: 0 });
  }
});

test('dcp: page j lies on rank j % ranks at entry j / ranks', () => {
  const pages = space('dcp', 3, 4);
  const table = new PageTable(pages, 0);
  table.grow(7 * 64);
  const tables = table.tables();
  assert.equal(tables.map((entries) => entries.length), [3, 2, 2]);
  for (let j = 0; j < 7; j++) assert.is(tables[j % 3]![Math.floor(j / 3)], table.page(j));
  assert.equal(pages.lanes.map((lane) => lane.counts.used), [3, 2, 2]);
  assert.equal(pages.spread(1, 5, 0), [1, 2, 1]);
  assert.is(pages.capacityTokens, 12 * 64);
});

test('dp: a sequence stays on its home rank', () => {
  const pages = space('dp', 2, 4);
  const table = new PageTable(pages, 1);
  table.grow(200);
  assert.equal(pages.available, [4, 0]);
  assert.is(table.rank, 1);
  assert.throws(() => table.append(), noPages);
  assert.is(pages.capacityTokens, 256);
});

test('growing is all or nothing', () => {
  const pages = space('mla', 1, 3);
  const table = new PageTable(pages, 0);
  table.grow(64);
  assert.throws(() => table.grow(64 * 5), noPages);
  assert.is(table.length, 1);
  assert.is(pages.counts.used, 1);
});

test('forked sequences share pages until one writes', () => {
  const pages = space('tpla', 2, 8);
  const first = new PageTable(pages, 0);
  first.grow(100);
  const second = first.fork();
  assert.is(pages.counts.used, 2);
  assert.ok(first.isShared(1));
  assert.equal(first.exclusive(), [0]);
  const before = first.page(1);
  const copy = second.unshare(1);
  assert.equal(copy, { from: before, to: second.page(1), rank: undefined });
  assert.is.not(copy.from, copy.to);
  assert.not.ok(first.isShared(1));
  assert.ok(first.isShared(0));
  assert.equal(first.exclusive(), [1]);
  first.release();
  assert.is(pages.counts.used, 2);
  second.release();
  assert.is(pages.counts.used, 0);
  assert.equal(pages.check(), []);
});

test('a copy with dcp names the rank of the page', () => {
  const pages = space('dcp', 2, 4);
  const table = new PageTable(pages, 0);
  table.grow(128);
  assert.is(table.fork().unshare(1).rank, 1);
});

test('a cached page is not written, even by its only user', () => {
  const pages = space('mla', 1, 4);
  const table = new PageTable(pages, 0);
  table.grow(64);
  assert.not.ok(table.isShared(0));
  table.publish(0, 'id');
  assert.ok(table.isShared(0));
});

test('a prefix is taken up from the cache, and its tail is evicted first', () => {
  const pages = space('mla', 1, 4);
  const ids = ['a', 'b', 'c'];
  const first = new PageTable(pages, 0);
  first.grow(64 * 3);
  ids.forEach((id, index) => first.publish(index, id));
  first.release();
  assert.equal(pages.counts, { total: 4, used: 0, cached: 3 });
  assert.is(pages.cachedPrefix([...ids, 'd'], 0), 3);

  const other = new PageTable(pages, 0);
  other.grow(64 * 2);
  assert.is(pages.cachedPrefix(ids, 0), 2);
  other.release();

  const second = new PageTable(pages, 0);
  second.adopt('a');
  second.adopt('b');
  assert.is(pages.counts.used, 2);
  assert.throws(() => second.adopt('c'), /not cached/);
  second.release();
  assert.equal(pages.check(), []);
});

test('publishing what is cached already gives the own page back', () => {
  const pages = space('dcp', 2, 4);
  const [first, second] = [new PageTable(pages, 0), new PageTable(pages, 0)];
  for (const table of [first, second]) table.grow(128);
  ['a', 'b'].forEach((id, index) => first.publish(index, id));
  second.tables();
  ['a', 'b'].forEach((id, index) => second.publish(index, id));
  assert.equal(second.tables(), first.tables());
  assert.is(pages.counts.used, 2);
  first.release();
  second.release();
  assert.equal(pages.counts, { total: 8, used: 0, cached: 2 });
  assert.equal(pages.check(), []);
});

test('recent ids are bounded, newest last', () => {
  const pages = space('mla', 1, 4);
  const table = new PageTable(pages, 0);
  table.grow(256);
  ['a', 'b', 'c', 'd'].forEach((id, index) => table.publish(index, id));
  assert.equal(pages.recentIds(2), ['c', 'd']);
});

test.run();
