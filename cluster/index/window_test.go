package index

import (
	"maps"
	"testing"

	"pgregory.net/rapid"

	"firn.io/firn/cluster/wire"
	"firn.io/firn/internal/block"
)

func TestRandomWindows(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		var w window
		w.reset()
		floor := block.OpSeq(1)
		want := map[block.OpSeq]wire.Outcome{}
		t.Repeat(map[string]func(*rapid.T){
			"remember": func(t *rapid.T) {
				op := floor + block.OpSeq(rapid.SampledFrom([]int{0, 1, 2, 31, 32, 63, 64, 65, 127, 1000, 4095}).Draw(t, "ahead"))
				if _, known := want[op]; known {
					return
				}
				o := rapid.SampledFrom([]wire.Outcome{wire.OutcomeApplied, wire.OutcomeOutOfRange, wire.OutcomeReadOnly, wire.OutcomeInvalid}).Draw(t, "outcome")
				w.remember(op, o)
				want[op] = o
			},
			"raise": func(t *rapid.T) {
				floor += block.OpSeq(rapid.SampledFrom([]int{0, 1, 1, 2, 63, 64, 4096, 100000}).Draw(t, "by"))
				w.raise(floor)
				w.raise(floor - 1)
				maps.DeleteFunc(want, func(op block.OpSeq, _ wire.Outcome) bool { return op < floor })
			},
			"store": func(t *rapid.T) {
				p := w.append(nil)
				var ok bool
				var rest []byte
				if w, rest, ok = decodeWindow(append(p, 7, 8)); !ok || len(rest) != 2 {
					t.Fatalf("%x does not decode", p)
				}
			},
			"": func(t *rapid.T) {
				if w.floor != floor {
					t.Fatalf("floor %d, want %d", w.floor, floor)
				}
				for i := range block.OpSeq(wire.OpWindow) {
					got, ok := w.outcome(floor + i)
					if o, known := want[floor+i]; ok != known || got != o {
						t.Fatalf("op %d: %d, %v, want %d, %v", floor+i, got, ok, o, known)
					}
				}
				if len(w.refusals) > len(want) {
					t.Fatalf("%d refusals kept of %d", len(w.refusals), len(want))
				}
			},
		})
	})
}

func TestWindowIsSmallForFewOperations(t *testing.T) {
	t.Parallel()
	var w window
	w.reset()
	for op := block.OpSeq(1); op < 1_000_000; op++ {
		if op > 32 {
			w.raise(op - 32)
		}
		w.remember(op, wire.OutcomeApplied)
	}
	if n := len(w.ring) * 8; n > 16 {
		t.Errorf("32 operations in flight take %d bytes", n)
	}
	if n := len(w.append(nil)); n > 10+9 {
		t.Errorf("stored in %d bytes", n)
	}
}

func FuzzDecodeWindow(f *testing.F) {
	var w window
	w.reset()
	f.Add(w.append(nil))
	w.remember(1, wire.OutcomeApplied)
	w.remember(70, wire.OutcomeOutOfRange)
	f.Add(w.append(nil))
	f.Fuzz(func(t *testing.T, p []byte) {
		w, rest, ok := decodeWindow(p)
		if !ok {
			return
		}
		if got := w.append(nil); string(got)+string(rest) != string(p) {
			t.Fatalf("%x decodes and encodes to %x, %x left", p, got, rest)
		}
	})
}
