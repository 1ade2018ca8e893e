package sim

import (
	"fmt"
	"math"

	"github.com/anishathalye/porcupine"

	"firn.io/firn/test/stamp"
)

// linear records what happened to some sectors and lets porcupine find an order
// of it: a checker that shares nothing with that of test/stamp, which knows all
// sectors but decides by intervals.
type linear struct {
	now     int64
	sectors map[int64][]*note
}

const (
	// One sector in so many is watched, each in another block of its chunk.
	watchedEvery = 1567
)

func newLinear() *linear { return &linear{sectors: map[int64][]*note{}} }

// note is one operation on the watched sectors that it covers. Its methods do
// nothing on nil.
type note struct {
	l              *linear
	write          bool
	seq            stamp.Seq // 0: zeros
	call, returned int64
	// maybe says that the write may have had no effect.
	maybe bool
}

func (l *linear) tick() int64 { l.now++; return l.now }

// watched are the watched sectors of a range.
func watched(from, n int64) (out []int64) {
	for s := (from + watchedEvery - 1) / watchedEvery * watchedEvery; s < from+n; s += watchedEvery {
		out = append(out, s)
	}
	return out
}

func (l *linear) write(from, n int64, seq stamp.Seq, zero bool) *note {
	at := watched(from, n)
	if len(at) == 0 {
		return nil
	}
	if zero {
		seq = 0
	}
	x := &note{l: l, write: true, seq: seq, call: l.tick(), returned: math.MaxInt64}
	for _, s := range at {
		l.sectors[s] = append(l.sectors[s], x)
	}
	return x
}

// end says that the operation has had its effect; of a read, which it returned.
func (x *note) end(seq stamp.Seq) {
	if x == nil {
		return
	}
	x.returned, x.maybe = x.l.tick(), false
	if !x.write {
		x.seq = seq
	}
}

// over says that the write has had its effect, or never will.
func (x *note) over() {
	if x != nil {
		x.returned, x.maybe = x.l.tick(), true
	}
}

// reading is a read of watched sectors that has begun.
type reading struct {
	l     *linear
	at    []int64
	begin int64
}

func (l *linear) read(from, n int64) reading {
	r := reading{l: l, at: watched(from, n)}
	if len(r.at) > 0 {
		r.begin = l.tick()
	}
	return r
}

// end takes what was read. Sectors that are no stamps are the history's business.
func (r reading) end(from int64, p []byte) {
	for _, s := range r.at {
		st, err := stamp.Parse(p[(s-from)*stamp.SectorBytes:][:stamp.SectorBytes])
		if err != nil {
			continue
		}
		x := &note{l: r.l, call: r.begin}
		x.end(st.Seq)
		r.l.sectors[s] = append(r.l.sectors[s], x)
	}
}

// register is a sector: a number that writes set and reads return.
var register = porcupine.NondeterministicModel{
	Init: func() []any { return []any{stamp.Seq(0)} },
	Step: func(state, input, _ any) []any {
		x := input.(*note)
		switch {
		case x.write && x.maybe && state != x.seq:
			return []any{state, x.seq}
		case x.write:
			return []any{x.seq}
		case state == x.seq:
			return []any{state}
		}
		return nil
	},
}

// check looks for an order for each watched sector; it returns how many
// operations it ordered.
func (l *linear) check(sectors int64) (ordered int, err error) {
	model := register.ToModel()
	for s := int64(0); s < sectors; s += watchedEvery {
		var ops []porcupine.Operation
		for _, x := range l.sectors[s] {
			ops = append(ops, porcupine.Operation{Input: x, Call: x.call, Return: x.returned})
		}
		if !porcupine.CheckOperations(model, ops) {
			return ordered, fmt.Errorf("linearizability: the %d operations on sector %d have no order", len(ops), s)
		}
		ordered += len(ops)
	}
	return ordered, nil
}
