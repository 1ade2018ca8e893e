package meta_test

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"firn.io/firn/cluster/meta"
	"firn.io/firn/internal/clock"
	"firn.io/firn/internal/loop"
)

// driven is a server in a world whose leases end in time.
func driven(seed uint64) (*loop.World, *meta.Mem) {
	w := loop.NewWorld(seed)
	server := w.NewLoop(nil)
	m := meta.NewMem(server)
	server.Post(func() { m.Drive(server) })
	return w, m
}

// TestASessionNeverOutlivesItsLease: whatever happens to the store, the
// connection and the process, a session that calls itself valid has its lease.
// Clocks run up to 5 % wrong.
func TestASessionNeverOutlivesItsLease(t *testing.T) {
	for seed := range uint64(200) {
		w, m := driven(seed)
		admin := m.Client()
		client := m.Client()
		l := w.NewLoop(nil)
		l.SetClock(0.95+0.1*w.Rand().Float64(), 0)
		grants, losses, validFor := 0, 0, 0
		var s *meta.Session
		s = meta.NewSession(l, client, meta.OwnerTTL, func(id meta.LeaseID) { grants++ }, func() { losses++ })
		check := func(when string) {
			// KeepAlive would prolong the lease, so a key under it is looked for.
			if !s.Valid() {
				return
			}
			validFor++
			_, err := admin.Txn(ctx, meta.Txn{Then: []meta.Op{meta.Put("/probe", nil, s.Lease())}})
			if err != nil {
				t.Fatalf("seed %d, %s: the session says valid at %v: %v", seed, when, w.Now(), err)
			}
		}
		l.Post(func() { s.Start(ctx) })
		var probe func()
		probe = func() { check("probe"); l.After(time.Duration(w.Rand().IntN(300))*time.Millisecond, probe) }
		l.Post(probe)
		for range 20 {
			w.RunFor(time.Duration(w.Rand().IntN(4000)) * time.Millisecond)
			switch w.Rand().IntN(5) {
			case 0:
				client.SetCut(true)
			case 1:
				client.SetCut(false)
			case 2:
				l.Pause()
				w.RunFor(time.Duration(w.Rand().IntN(6000)) * time.Millisecond)
				l.Resume()
			case 3:
				client.Inject(func(meta.Call) meta.Fault { return meta.Fault(w.Rand().IntN(3)) })
			case 4:
				client.Inject(nil)
			}
		}
		client.SetCut(false)
		client.Inject(nil)
		if !w.RunUntil(20*time.Second, s.Valid) {
			t.Fatalf("seed %d: the session did not come back", seed)
		}
		if validFor == 0 || grants <= losses {
			t.Fatalf("seed %d: %d grants, %d losses, %d times valid", seed, grants, losses, validFor)
		}
		lease := s.Lease()
		l.Post(func() { s.Stop(func(error) {}) })
		w.RunFor(time.Second)
		if _, err := admin.Txn(ctx, meta.Txn{Then: []meta.Op{meta.Put("/probe", nil, lease)}}); err == nil {
			t.Fatalf("seed %d: a stopped session left its lease", seed)
		}
	}
}

// TestAMirrorAlwaysArrives: through cuts, lost calls, restored backups and
// changes at any time, a mirror ends up with what the store holds, and its user
// was told exactly that.
func TestAMirrorAlwaysArrives(t *testing.T) {
	for seed := range uint64(200) {
		w, m := driven(seed)
		admin, client := m.Client(), m.Client()
		l := w.NewLoop(func(loop.Class, *rand.Rand) time.Duration { return 50 * time.Millisecond })
		told := map[string]string{}
		mirror := meta.NewMirror(l, client, "/m/", func(kv meta.KV) {
			if kv.Exists() {
				told[kv.Key] = string(kv.Value)
			} else if _, had := told[kv.Key]; !had {
				t.Fatalf("seed %d: told of the end of %s, which it never had", seed, kv.Key)
			} else {
				delete(told, kv.Key)
			}
		}, nil)
		l.Post(func() { mirror.Start(ctx) })
		r := w.Rand()
		backup := m.Backup()
		for i := range 60 {
			w.RunFor(time.Duration(r.IntN(60)) * time.Millisecond)
			key := fmt.Sprintf("/m/%d", r.IntN(5))
			op := meta.Put(key, fmt.Append(nil, i), 0)
			if r.IntN(3) == 0 {
				op = meta.Delete(key)
			}
			if _, err := admin.Txn(ctx, meta.Txn{Then: []meta.Op{op}}); err != nil {
				t.Fatal(err)
			}
			switch r.IntN(12) {
			case 0:
				client.SetCut(true)
			case 1, 2:
				client.SetCut(false)
			case 3:
				backup = m.Backup()
			case 4:
				m.Restore(backup)
			case 5:
				l.Post(mirror.Relist)
			case 6:
				client.Inject(func(meta.Call) meta.Fault { return meta.Fault(r.IntN(3)) })
			case 7:
				client.Inject(nil)
			}
		}
		client.SetCut(false)
		client.Inject(nil)
		w.RunFor(3 * time.Second)
		kvs, _, err := admin.List(ctx, "/m/")
		if err != nil {
			t.Fatal(err)
		}
		if len(told) != len(kvs) || len(mirror.Keys()) != len(kvs) {
			t.Fatalf("seed %d: told %v, mirror %v, the store has %v", seed, told, mirror.Keys(), kvs)
		}
		for _, kv := range kvs {
			if told[kv.Key] != string(kv.Value) || string(mirror.Get(kv.Key).Value) != string(kv.Value) {
				t.Fatalf("seed %d: %s is %q, told %q", seed, kv.Key, kv.Value, told[kv.Key])
			}
		}
	}
}

// TestAStoppedMirrorIsSilent also stops in the middle of a list and of a callback.
func TestAStoppedMirrorIsSilent(t *testing.T) {
	for seed := range uint64(50) {
		w, m := driven(seed)
		s := m.Client()
		for i := range 5 {
			if _, err := s.Txn(ctx, meta.Txn{Then: []meta.Op{meta.Put(fmt.Sprintf("/m/%d", i), nil, 0)}}); err != nil {
				t.Fatal(err)
			}
		}
		l := w.NewLoop(nil)
		var mirror *meta.Mirror
		stopped, calls := false, 0
		mirror = meta.NewMirror(l, s, "/m/", func(meta.KV) {
			if stopped {
				t.Fatal("a stopped mirror spoke")
			}
			if calls++; calls == int(seed%7) {
				stopped = true
				mirror.Stop()
			}
		}, func() {
			if stopped {
				t.Fatal("a stopped mirror spoke")
			}
		})
		l.Post(func() { mirror.Start(ctx) })
		w.RunFor(time.Duration(w.Rand().IntN(1500)) * time.Microsecond)
		l.Post(func() { stopped = true; mirror.Stop() })
		w.RunFor(time.Second)
	}
}

func TestMemReplays(t *testing.T) {
	run := func() (out string) {
		w, m := driven(9)
		c := m.Client()
		stop := c.Watch(w.NewLoop(nil), "/", func(n meta.Notice) { out += fmt.Sprint(n) })
		for i := range 5 {
			lease, err := c.Grant(ctx, time.Duration(1+i%2)*time.Second)
			if err != nil {
				t.Fatal(err)
			}
			for j := range 10 {
				if _, err := c.Txn(ctx, meta.Txn{Then: []meta.Op{meta.Put(fmt.Sprintf("/%d/%d", i, j), nil, lease)}}); err != nil {
					t.Fatal(err)
				}
			}
		}
		w.RunFor(5 * time.Second)
		stop()
		return out
	}
	if a, b := run(), run(); a != b {
		t.Fatalf("two runs differ:\n%s\n%s", a, b)
	}
}

var _ clock.Clock = (*loop.Sim)(nil)
