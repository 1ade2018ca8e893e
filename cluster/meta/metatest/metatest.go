// Package metatest is the conformance suite of meta.Store, and the way for
// tests to start a real etcd.
package metatest

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"firn.io/firn/cluster/meta"
	"firn.io/firn/internal/block"
	"firn.io/firn/internal/loop"
)

// Kind is a kind of store under test.
type Kind struct {
	// Open returns a store and the loop for its watches. Each call connects
	// anew to the same server.
	Open func(t *testing.T) (meta.Store, loop.Loop)
	// Until lets events happen until cond holds; cond runs on the loop. It
	// returns false when it gave up, after 30 s of the kind's time.
	Until func(cond func() bool) bool
	// Pass lets d of the kind's time pass.
	Pass func(d time.Duration)
}

// Run tests one kind. The suite uses keys below /metatest/, anew for each test.
func Run(t *testing.T, k Kind) {
	tests := []struct {
		name string
		run  func(t *testing.T, e *env)
	}{
		{"GetAndRevisions", testGet},
		{"ListIsAPrefixInOrder", testList},
		{"ListOfManyPages", testManyPages},
		{"Conditions", testConditions},
		{"StepsOfOneTransaction", testSteps},
		{"Limits", testLimits},
		{"OneOfManyWins", testRace},
		{"LeaseEndsWithItsKeys", testLeaseEnds},
		{"LeaseIsKeptAlive", testKeepAlive},
		{"LeaseIsRevoked", testRevoke},
		{"PutMovesAKeyBetweenLeases", testMoveLease},
		{"WatchBeginsWithAResync", testWatchResync},
		{"WatchTellsChanges", testWatchChanges},
		{"WatchTellsEndedLeases", testWatchLease},
		{"WatchStops", testWatchStops},
		{"MirrorFollows", testMirror},
		{"CanceledContext", testCanceled},
	}
	for i, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			s, l := k.Open(t)
			t.Cleanup(func() {
				if err := s.Close(); err != nil {
					t.Errorf("close: %v", err)
				}
			})
			test.run(t, &env{T: t, s: s, loop: l, kind: k, ctx: context.Background(), at: fmt.Sprintf("/metatest/%d/", i)})
		})
	}
}

type env struct {
	*testing.T
	s    meta.Store
	loop loop.Loop
	kind Kind
	ctx  context.Context
	at   string // prefix of this test's keys
}

func (e *env) ok(err error) {
	e.Helper()
	if err != nil {
		e.Fatal(err)
	}
}

func (e *env) put(key, value string, lease meta.LeaseID) meta.KV {
	e.Helper()
	r, err := e.s.Txn(e.ctx, meta.Txn{Then: []meta.Op{meta.Put(e.at+key, []byte(value), lease), meta.Read(e.at + key)}})
	e.ok(err)
	return r.Read[0]
}

func (e *env) get(key string) meta.KV {
	e.Helper()
	kv, err := e.s.Get(e.ctx, e.at+key)
	e.ok(err)
	return kv
}

func (e *env) until(what string, cond func() bool) {
	e.Helper()
	if !e.kind.Until(cond) {
		e.Fatalf("never happened: %s", what)
	}
}

func (e *env) wantKind(err error, k block.Kind) {
	e.Helper()
	if err == nil || !errors.Is(err, k) {
		e.Fatalf("got error %v, want kind %q", err, k)
	}
}

func testGet(t *testing.T, e *env) {
	if kv := e.get("a"); kv.Exists() || kv.Key != e.at+"a" {
		t.Fatalf("an absent key: %+v", kv)
	}
	first := e.put("a", "1", 0)
	if !first.Exists() || first.Created != first.Modified || string(first.Value) != "1" || first.Lease != 0 {
		t.Fatalf("a new key: %+v", first)
	}
	second := e.put("a", "", 0)
	if second.Created != first.Created || second.Modified <= first.Modified || len(second.Value) != 0 {
		t.Fatalf("a changed key: %+v after %+v", second, first)
	}
	_, err := e.s.Txn(e.ctx, meta.Txn{Then: []meta.Op{meta.Delete(e.at + "a"), meta.Delete(e.at + "never")}})
	e.ok(err)
	if e.get("a").Exists() {
		t.Fatal("a deleted key exists")
	}
	third := e.put("a", "3", 0)
	if third.Created <= second.Modified {
		t.Fatalf("a key that came back kept its creation: %+v after %+v", third, second)
	}
}

func testList(t *testing.T, e *env) {
	for _, k := range []string{"l/b", "l/a", "l/c/d", "l", "m"} {
		e.put(k, k, 0)
	}
	kvs, at, err := e.s.List(e.ctx, e.at+"l/")
	e.ok(err)
	var got []string
	for _, kv := range kvs {
		got = append(got, kv.Key[len(e.at):])
		if kv.Modified > at {
			t.Fatalf("%s was changed at %d, after the list's %d", kv.Key, kv.Modified, at)
		}
	}
	if fmt.Sprint(got) != "[l/a l/b l/c/d]" {
		t.Fatalf("listed %v", got)
	}
	_, _, err = e.s.List(e.ctx, "")
	e.wantKind(err, block.Invalid)
}

func testManyPages(t *testing.T, e *env) {
	const n = 2050
	for i := 0; i < n; i += 100 {
		var ops []meta.Op
		for j := i; j < min(i+100, n); j++ {
			ops = append(ops, meta.Put(fmt.Sprintf("%sk%05d", e.at, j), []byte("x"), 0))
		}
		_, err := e.s.Txn(e.ctx, meta.Txn{Then: ops})
		e.ok(err)
	}
	kvs, _, err := e.s.List(e.ctx, e.at)
	e.ok(err)
	if len(kvs) != n {
		t.Fatalf("listed %d keys of %d", len(kvs), n)
	}
	for i, kv := range kvs {
		if kv.Key != fmt.Sprintf("%sk%05d", e.at, i) {
			t.Fatalf("key %d is %s", i, kv.Key)
		}
	}
}

func testConditions(t *testing.T, e *env) {
	old := e.put("k", "1", 0)
	now := e.put("k", "2", 0)
	none := e.get("none")
	k, no := e.at+"k", e.at+"none"
	cases := []struct {
		name string
		cond meta.Cond
		want bool
	}{
		{"absent, is there", meta.Absent(k), false},
		{"absent, is not", meta.Absent(no), true},
		{"present, is there", meta.Present(k), true},
		{"present, is not", meta.Present(no), false},
		{"created then", meta.CreatedAt(k, now.Created), true},
		{"created at another time", meta.CreatedAt(k, now.Modified), false},
		{"created never", meta.CreatedAt(no, 0), true},
		{"unchanged", meta.Unchanged(now), true},
		{"changed since", meta.Unchanged(old), false},
		{"still absent", meta.Unchanged(none), true},
		{"value", meta.ValueIs(k, []byte("2")), true},
		{"old value", meta.ValueIs(k, []byte("1")), false},
		{"empty value of an absent key", meta.ValueIs(no, nil), false},
	}
	for _, c := range cases {
		r, err := e.s.Txn(e.ctx, meta.Txn{If: []meta.Cond{meta.Present(k), c.cond}})
		e.ok(err)
		if r.Succeeded != c.want {
			t.Errorf("%s: %v", c.name, r.Succeeded)
		}
	}
}

func testSteps(t *testing.T, e *env) {
	a, b := e.at+"a", e.at+"b"
	e.put("b", "old", 0)
	r, err := e.s.Txn(e.ctx, meta.Txn{
		If:   []meta.Cond{meta.Absent(a)},
		Then: []meta.Op{meta.Read(b), meta.Put(a, []byte("new"), 0), meta.Read(a), meta.Delete(b), meta.Read(b)},
		Else: []meta.Op{meta.Read(a)},
	})
	e.ok(err)
	if !r.Succeeded || len(r.Read) != 3 || string(r.Read[0].Value) != "old" || string(r.Read[1].Value) != "new" || r.Read[2].Exists() {
		t.Fatalf("%+v", r)
	}
	if r.Read[1].Modified != r.Revision {
		t.Fatalf("changed at %d in the transaction of %d", r.Read[1].Modified, r.Revision)
	}
	r, err = e.s.Txn(e.ctx, meta.Txn{If: []meta.Cond{meta.Absent(a)}, Then: []meta.Op{meta.Delete(a)}, Else: []meta.Op{meta.Read(a), meta.Read(b)}})
	e.ok(err)
	if r.Succeeded || len(r.Read) != 2 || string(r.Read[0].Value) != "new" || r.Read[1].Exists() {
		t.Fatalf("%+v", r)
	}
}

func testLimits(t *testing.T, e *env) {
	many := make([]meta.Op, meta.MaxTxnOps)
	for i := range many {
		many[i] = meta.Put(fmt.Sprintf("%s%d", e.at, i), nil, 0)
	}
	_, err := e.s.Txn(e.ctx, meta.Txn{Then: many})
	e.ok(err)
	_, err = e.s.Txn(e.ctx, meta.Txn{Then: append(many, meta.Read(e.at+"x"))})
	e.wantKind(err, block.Invalid)
	_, err = e.s.Txn(e.ctx, meta.Txn{Then: []meta.Op{meta.Put(e.at+"k", nil, 0), meta.Delete(e.at + "k")}})
	e.wantKind(err, block.Invalid)
	e.put("big", string(make([]byte, meta.MaxValueBytes)), 0)
	_, err = e.s.Txn(e.ctx, meta.Txn{Then: []meta.Op{meta.Put(e.at+"k", make([]byte, meta.MaxValueBytes+1), 0)}})
	e.wantKind(err, block.Invalid)
	if e.get("k").Exists() {
		t.Fatal("a refused transaction had an effect")
	}
}

func testRace(t *testing.T, e *env) {
	const tries = 16
	won := make(chan int, tries)
	for i := range tries {
		go func() {
			r, err := e.s.Txn(e.ctx, meta.Txn{
				If: []meta.Cond{meta.Absent(e.at + "k")}, Then: []meta.Op{meta.Put(e.at+"k", fmt.Append(nil, i), 0)},
			})
			switch {
			case err != nil:
				won <- -2
			case r.Succeeded:
				won <- i
			default:
				won <- -1
			}
		}()
	}
	winner := -1
	for range tries {
		switch w := <-won; {
		case w == -2:
			t.Fatal("a transaction failed")
		case w >= 0 && winner >= 0:
			t.Fatal("two winners")
		case w >= 0:
			winner = w
		}
	}
	if got := string(e.get("k").Value); got != fmt.Sprint(winner) {
		t.Fatalf("%d won, the key says %s", winner, got)
	}
}

const shortTTL = 2 * time.Second

func (e *env) grant() meta.LeaseID {
	e.Helper()
	id, err := e.s.Grant(e.ctx, shortTTL)
	e.ok(err)
	if id == 0 {
		e.Fatal("lease 0")
	}
	return id
}

func testLeaseEnds(t *testing.T, e *env) {
	lease := e.grant()
	if kv := e.put("k", "v", lease); kv.Lease != lease {
		t.Fatalf("%+v hangs not on lease %d", kv, lease)
	}
	e.put("stays", "v", 0)
	e.until("the key vanishes", func() bool { kv, err := e.s.Get(e.ctx, e.at+"k"); return err == nil && !kv.Exists() })
	if !e.get("stays").Exists() {
		t.Fatal("a key without a lease vanished")
	}
	e.wantKind(e.s.KeepAlive(e.ctx, lease), block.NotFound)
	_, err := e.s.Txn(e.ctx, meta.Txn{Then: []meta.Op{meta.Put(e.at+"late", nil, lease)}})
	e.wantKind(err, block.NotFound)
}

func testKeepAlive(t *testing.T, e *env) {
	lease := e.grant()
	e.put("k", "v", lease)
	for range 6 {
		e.kind.Pass(shortTTL / 3)
		e.ok(e.s.KeepAlive(e.ctx, lease))
	}
	if !e.get("k").Exists() {
		t.Fatal("the key of a living lease vanished")
	}
	e.wantKind(e.s.KeepAlive(e.ctx, lease+1<<40), block.NotFound)
}

func testRevoke(t *testing.T, e *env) {
	lease := e.grant()
	e.put("a", "v", lease)
	e.put("b", "v", lease)
	e.ok(e.s.Revoke(e.ctx, lease))
	if e.get("a").Exists() || e.get("b").Exists() {
		t.Fatal("keys of a revoked lease exist")
	}
	e.ok(e.s.Revoke(e.ctx, lease))
	e.wantKind(e.s.KeepAlive(e.ctx, lease), block.NotFound)
}

func testMoveLease(t *testing.T, e *env) {
	first, second := e.grant(), e.grant()
	e.put("moved", "v", first)
	e.put("moved", "v", second)
	e.put("freed", "v", first)
	e.put("freed", "v", 0)
	e.ok(e.s.Revoke(e.ctx, first))
	if kv := e.get("moved"); kv.Lease != second {
		t.Fatalf("a key moved to lease %d: %+v", second, kv)
	}
	if kv := e.get("freed"); !kv.Exists() || kv.Lease != 0 {
		t.Fatalf("a freed key: %+v", kv)
	}
	e.ok(e.s.Revoke(e.ctx, second))
	if e.get("moved").Exists() {
		t.Fatal("a key outlived the lease it was moved to")
	}
}

func testWatchResync(t *testing.T, e *env) {
	e.put("before", "v", 0)
	var got []meta.Notice
	stop := e.s.Watch(e.loop, e.at, func(n meta.Notice) { got = append(got, n) })
	e.until("the first notice", func() bool { return len(got) > 0 })
	e.kind.Until(func() bool {
		if !got[0].Resync || len(got[0].Changes) > 0 || len(got) > 1 {
			t.Errorf("notices %+v", got)
		}
		stop()
		return true
	})
}

func testWatchChanges(t *testing.T, e *env) {
	var seen []meta.Change
	ready := false
	stop := e.s.Watch(e.loop, e.at+"w/", func(n meta.Notice) {
		ready = ready || n.Resync
		seen = append(seen, n.Changes...)
	})
	e.until("the resync", func() bool { return ready })
	a := e.put("w/a", "1", 0)
	e.put("other", "1", 0)
	r, err := e.s.Txn(e.ctx, meta.Txn{Then: []meta.Op{meta.Put(e.at+"w/b", []byte("2"), 0), meta.Put(e.at+"w/c", []byte("3"), 0)}})
	e.ok(err)
	d, err := e.s.Txn(e.ctx, meta.Txn{Then: []meta.Op{meta.Delete(e.at + "w/a")}})
	e.ok(err)
	e.until("four changes", func() bool { return len(seen) >= 4 })
	e.kind.Until(func() bool {
		ok := len(seen) == 4 && seen[0].KV.Key == a.Key && string(seen[0].KV.Value) == "1" && seen[0].KV.Modified == a.Modified && !seen[0].Deleted &&
			seen[1].KV.Modified == r.Revision && seen[2].KV.Modified == r.Revision && seen[1].KV.Created == r.Revision &&
			seen[3].Deleted && seen[3].KV.Key == a.Key && seen[3].KV.Modified == d.Revision && len(seen[3].KV.Value) == 0
		if !ok {
			t.Errorf("seen %+v", seen)
		}
		stop()
		return true
	})
}

func testWatchLease(t *testing.T, e *env) {
	lease := e.grant()
	e.put("k", "v", lease)
	gone, ready := false, false
	stop := e.s.Watch(e.loop, e.at, func(n meta.Notice) {
		ready = ready || n.Resync
		for _, c := range n.Changes {
			gone = gone || c.Deleted && c.KV.Key == e.at+"k"
		}
	})
	e.until("the notice of a key that its lease took", func() bool { return gone })
	e.kind.Until(func() bool { stop(); return true })
}

func testWatchStops(t *testing.T, e *env) {
	stopped, after, ready := false, 0, false
	stop := e.s.Watch(e.loop, e.at, func(n meta.Notice) {
		ready = true
		if stopped {
			after++
		}
	})
	e.until("the resync", func() bool { return ready })
	e.put("a", "1", 0)
	e.kind.Until(func() bool { stopped = true; stop(); return true })
	e.put("b", "1", 0)
	other := false
	stop2 := e.s.Watch(e.loop, e.at, func(meta.Notice) { other = true })
	e.put("c", "1", 0)
	e.until("another watch hears", func() bool { return other })
	e.kind.Until(func() bool {
		stop2()
		if after != 0 {
			t.Errorf("%d notices after stop", after)
		}
		return true
	})
}

func testMirror(t *testing.T, e *env) {
	e.put("m/old", "1", 0)
	told := map[string]string{}
	var m *meta.Mirror
	e.kind.Until(func() bool {
		m = meta.NewMirror(e.loop, e.s, e.at+"m/", func(kv meta.KV) {
			if kv.Exists() {
				told[kv.Key] = string(kv.Value)
			} else {
				delete(told, kv.Key)
			}
		}, nil)
		m.Start(e.ctx)
		return true
	})
	e.until("the mirror has listed", func() bool { return m.Ready() })
	for i := range 20 {
		e.put(fmt.Sprintf("m/%d", i), fmt.Sprint(i), 0)
	}
	_, err := e.s.Txn(e.ctx, meta.Txn{Then: []meta.Op{meta.Delete(e.at + "m/old"), meta.Delete(e.at + "m/3")}})
	e.ok(err)
	e.until("the mirror has followed", func() bool { return len(told) == 19 && told[e.at+"m/19"] == "19" && told[e.at+"m/old"] == "" })
	e.kind.Until(func() bool {
		m.Relist()
		return true
	})
	e.until("the mirror agrees", func() bool {
		return len(m.Keys()) == 19 && string(m.Get(e.at+"m/7").Value) == "7" && !m.Get(e.at+"m/3").Exists()
	})
	e.kind.Until(func() bool { m.Stop(); return true })
}

func testCanceled(t *testing.T, e *env) {
	ctx, cancel := context.WithCancel(e.ctx)
	cancel()
	_, err := e.s.Get(ctx, e.at+"k")
	e.wantKind(err, block.Canceled)
	_, err = e.s.Txn(ctx, meta.Txn{Then: []meta.Op{meta.Put(e.at+"k", nil, 0)}})
	e.wantKind(err, block.Canceled)
}
