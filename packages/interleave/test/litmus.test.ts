import { expect, test } from 'vitest'
import { explore, type LitmusTest, litmusScenario, litmusText } from '../src/index.ts'

/** Message passing: data, then a flag. */
const passing: LitmusTest = {
  name: 'MP+wmb+rmb',
  initial: { data: 0, flag: 0 },
  threads: [
    { name: 'sender', steps: [{ write: 'data', value: 7 }, { fence: 'wmb' }, { write: 'flag', value: 1 }] },
    { name: 'receiver', steps: [{ read: 'flag', into: 'there' }, { fence: 'rmb' }, { read: 'data', into: 'what' }] },
  ],
  forbidden: [{}, { there: 1, what: 0 }],
}

test('the text for herd7', () => {
  expect(litmusText(passing)).toBe(`C MP+wmb+rmb

{ data=0; flag=0; }

// sender
P0(int *data, int *flag)
{
	WRITE_ONCE(*data, 7);
	smp_wmb();
	WRITE_ONCE(*flag, 1);
}

// receiver
P1(int *flag, int *data)
{
	int there;
	int what;
	there = READ_ONCE(*flag);
	smp_rmb();
	what = READ_ONCE(*data);
}

exists (1:there=1 /\\ 1:what=0)
`)
  const counted = litmusText({
    name: 'count',
    initial: { n: 1 },
    threads: [
      { name: 'up', steps: [{ add: 'n', value: 2, into: 'now' }] },
      {
        name: 'other',
        steps: [
          { write: 'n', value: 5 },
          { read: 'n', into: 'seen' },
        ],
      },
    ],
    forbidden: [{ now: 9 }, { seen: 9 }],
  })
  for (const line of [
    'now = atomic_add_return(2, n);',
    'atomic_set(n, 5);',
    'seen = atomic_read(n);',
    'P1(atomic_t *n)',
  ])
    expect(counted).toContain(line)
})

test('the scenario: every order of whole accesses', () => {
  expect(explore(litmusScenario(passing))).toMatchObject({ kind: 'holds', histories: '6' })
  const [sender, receiver] = passing.threads
  const reversed = { ...passing, threads: [{ ...sender!, steps: sender!.steps.toReversed() }, receiver!] }
  expect(explore(litmusScenario(reversed))).toMatchObject({
    kind: 'violated',
    name: 'forbidden',
    message: '1:there=1, 1:what=0',
  })
  const atomic: LitmusTest = {
    name: 'atomic',
    initial: { n: 0 },
    threads: [1, 2].map((value) => ({ name: `${value}`, steps: [{ add: 'n', value, into: 'now' }] })),
    forbidden: [{ now: 1 }, { now: 2 }],
  }
  expect(explore(litmusScenario(atomic)).kind).toBe('holds')
})

test.each([
  ['a name that herd7 does not read', { name: 'two words' }, /"two words" cannot be the name/],
  ['a location without a first value', { initial: { data: 0 } }, /sender of MP\+wmb\+rmb uses flag, which has no/],
  ['a register that there is not', { forbidden: [{ there: 1 }] }, /names register there of thread 0, which has none/],
] as const)('%s', (_, more, message) => {
  const wrong = { ...passing, ...more } as LitmusTest
  expect(() => litmusText(wrong)).toThrow(message)
  expect(() => litmusScenario(wrong)).toThrow(RangeError)
})
