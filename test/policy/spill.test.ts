import { test } from 'uvu';
import * as assert from 'uvu/assert';
import { chooseSpills } from '../../src/policy/spill.js';

const idle = ['a', 'b', 'c', 'd', 'e', 'f'];
const state = { slots: 32, free: 0, underWay: 0, maxUnderWay: 8 };
const none = () => false;

test('nothing is written while there is room', () => {
  assert.equal(chooseSpills({ ...state, free: 4 }, idle, none), []);
  assert.equal(chooseSpills({ ...state, free: 30 }, idle, none), []);
});

test('what will be evicted next is written, until an eighth of the memory can make room', () => {
  assert.equal(chooseSpills(state, idle, none), ['a', 'b', 'c', 'd']);
  assert.equal(chooseSpills({ ...state, free: 3 }, idle, none), ['a']);
  assert.equal(chooseSpills({ ...state, slots: 1 }, idle, none), ['a']);
});

test('blocks on disk count as room, and so do those on their way', () => {
  assert.equal(chooseSpills(state, idle, (id) => id === 'a' || id === 'c'), ['b', 'd']);
  assert.equal(chooseSpills({ ...state, underWay: 3 }, idle, none), ['a']);
});

test('no more are written at a time than may be', () => {
  assert.equal(chooseSpills({ ...state, maxUnderWay: 2 }, idle, none), ['a', 'b']);
  assert.equal(chooseSpills({ ...state, underWay: 2, maxUnderWay: 2 }, idle, none), []);
});

test.run();
