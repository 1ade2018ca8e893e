// Package storetest is the conformance suite of index.Store.
package storetest

import (
	"bytes"
	"fmt"
	"maps"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"firn.io/firn/cluster/index"
)

// Kind makes stores of one kind.
type Kind struct {
	// New returns an empty store.
	New func(t testing.TB) index.Store
	// Crash returns the store as a crash may leave it, open: what was flushed
	// and a prefix of the batches after it, drawn by choice if there is one.
	// s is not used afterwards; its snapshots are closed.
	Crash func(t testing.TB, s index.Store, choice func(n int) int) index.Store
}

// Run checks that the kind keeps index.Store's promises.
func Run(t *testing.T, k Kind) {
	t.Run("batches are whole and snapshots still", func(t *testing.T) { still(t, k) })
	t.Run("iterators stay in their range", func(t *testing.T) { ranges(t, k) })
	t.Run("random histories with crashes", func(t *testing.T) {
		rapid.Check(t, func(rt *rapid.T) { history(t, rt, k) })
	})
}

func commit(t testing.TB, s index.Store, f func(index.Batch)) {
	t.Helper()
	b := s.NewBatch()
	f(b)
	if err := s.Commit(b); err != nil {
		t.Fatal(err)
	}
}

func still(t *testing.T, k Kind) {
	s := k.New(t)
	commit(t, s, func(b index.Batch) {
		b.Set([]byte("a"), []byte("1"))
		b.Set([]byte("b"), nil)
		b.Set([]byte("a"), []byte("2"))
	})
	before := s.Snapshot()
	key := []byte("a")
	commit(t, s, func(b index.Batch) {
		b.Delete(key)
		key[0] = 'x' // batches copy
		b.Set([]byte("c"), []byte("3"))
		if b.Size() == 0 {
			t.Error("a batch of two changes has size 0")
		}
	})
	after := s.Snapshot()
	expect(t, before, map[string]string{"a": "2", "b": ""})
	expect(t, after, map[string]string{"b": "", "c": "3"})
	if v, ok, err := before.Get([]byte("p"), []byte("a")); err != nil || !ok || string(v) != "p2" {
		t.Errorf("Get appends: %q, %v, %v", v, ok, err)
	}
	if _, ok, err := after.Get(nil, []byte("a")); err != nil || ok {
		t.Errorf("a deleted key: %v, %v", ok, err)
	}
	for _, c := range []index.Snapshot{before, after} {
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Flush(); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

func ranges(t *testing.T, k Kind) {
	s := k.New(t)
	commit(t, s, func(b index.Batch) {
		for i := range 100 {
			b.Set(fmt.Appendf(nil, "%02d", i), fmt.Appendf(nil, "v%d", i))
		}
		b.DeleteRange([]byte("20"), []byte("30"))
		b.DeleteRange([]byte("50"), []byte("40")) // empty
		b.Set([]byte("25"), []byte("again"))
	})
	snap := s.Snapshot()
	it, err := snap.Iterate([]byte("10"), []byte("60"))
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for ok := it.Seek([]byte("18")); ok; ok = it.Next() {
		got = append(got, string(it.Key()))
	}
	want := []string{"18", "19", "25"}
	for i := 30; i < 60; i++ {
		want = append(want, fmt.Sprint(i))
	}
	if !slices.Equal(got, want) || it.Err() != nil {
		t.Errorf("%v, %v", got, it.Err())
	}
	if !it.Seek([]byte("59")) || string(it.Value()) != "v59" || it.Next() {
		t.Error("the last key of the range")
	}
	if it.Seek([]byte("590")) || it.Next() {
		t.Error("beyond the last key")
	}
	if !it.Seek([]byte("10")) || string(it.Key()) != "10" {
		t.Error("back to the first key")
	}
	if err := it.Close(); err != nil {
		t.Fatal(err)
	}
	if err := snap.Close(); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

func expect(t testing.TB, s index.Snapshot, want map[string]string) {
	t.Helper()
	got := content(t, s)
	if !maps.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

func content(t testing.TB, s index.Snapshot) map[string]string {
	t.Helper()
	it, err := s.Iterate(nil, []byte{0xff})
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	var last []byte
	for ok := it.Seek(nil); ok; ok = it.Next() {
		if last != nil && bytes.Compare(last, it.Key()) >= 0 {
			t.Fatalf("%q after %q", it.Key(), last)
		}
		last = append(last[:0], it.Key()...)
		got[string(it.Key())] = string(it.Value())
	}
	if it.Err() != nil {
		t.Fatal(it.Err())
	}
	if err := it.Close(); err != nil {
		t.Fatal(err)
	}
	return got
}

// history runs batches, flushes and crashes against a list of maps.
func history(t testing.TB, rt *rapid.T, k Kind) {
	s := k.New(t)
	states := []map[string]string{{}} // states[0] is durable, the last visible
	key := rapid.StringMatching(`[a-d]{1,3}`)
	visible := func() map[string]string { return states[len(states)-1] }
	rt.Repeat(map[string]func(*rapid.T){
		"batch": func(rt *rapid.T) {
			next := maps.Clone(visible())
			b := s.NewBatch()
			for range rapid.IntRange(1, 8).Draw(rt, "ops") {
				a := key.Draw(rt, "key")
				switch rapid.IntRange(0, 5).Draw(rt, "op") {
				case 0:
					b.Delete([]byte(a))
					delete(next, a)
				case 1:
					to := key.Draw(rt, "to")
					b.DeleteRange([]byte(a), []byte(to))
					maps.DeleteFunc(next, func(k, _ string) bool { return k >= a && k < to })
				default:
					v := rapid.StringN(0, 4, 8).Draw(rt, "value")
					b.Set([]byte(a), []byte(v))
					next[a] = v
				}
			}
			if err := s.Commit(b); err != nil {
				rt.Fatal(err)
			}
			states = append(states, next)
		},
		"flush": func(rt *rapid.T) {
			if err := s.Flush(); err != nil {
				rt.Fatal(err)
			}
			states = states[len(states)-1:]
		},
		"crash": func(rt *rapid.T) {
			s = k.Crash(t, s, func(n int) int { return rapid.IntRange(0, n).Draw(rt, "kept") })
			snap := s.Snapshot()
			got := content(t, snap)
			if err := snap.Close(); err != nil {
				rt.Fatal(err)
			}
			if !slices.ContainsFunc(states, func(m map[string]string) bool { return maps.Equal(m, got) }) {
				rt.Fatalf("after a crash %v, none of %v", got, states)
			}
			states = []map[string]string{got}
		},
		"": func(rt *rapid.T) {
			snap := s.Snapshot()
			defer snap.Close()
			if got := content(t, snap); !maps.Equal(got, visible()) {
				rt.Fatalf("%v, want %v", got, visible())
			}
		},
	})
	if err := s.Close(); err != nil {
		rt.Fatal(err)
	}
}
