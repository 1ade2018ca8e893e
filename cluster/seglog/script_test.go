package seglog

import (
	"time"

	"firn.io/firn/internal/block"
)

// grown appends n entries behind the last, in its term or a newer one.
func (r *rig) grown(k ReplicaKey, term uint64, n int) {
	s := r.reps[k].now()
	r.append(k, s.last()+1, max(term, s.term(s.last())), n)
}

// saved applies and checkpoints what is durable, and truncates but for keep entries.
func (r *rig) saved(keep uint64, keys ...ReplicaKey) {
	if r.failed != nil || r.dead() {
		return
	}
	for _, k := range keys {
		r.apply(k)
	}
	r.checkpoint()
	for _, k := range keys {
		r.truncate(k, keep)
	}
}

// moreScripts are workloads of several parts of the log at once.
var moreScripts = map[string]func(g *rig){
	"two replicas, one truncated": func(g *rig) {
		a, b := ReplicaKey{1, 1}, ReplicaKey{2, 1}
		g.create(a)
		g.create(b)
		for i := range 6 {
			g.grown(a, 5, 2)
			g.grown(b, 5, 1)
			g.run(time.Millisecond)
			if i%2 == 1 {
				g.saved(0, a)
			}
		}
		g.run(5 * time.Millisecond)
	},
	"hard state with each entry": func(g *rig) {
		k := ReplicaKey{1, 1}
		g.create(k)
		for i := range uint64(8) {
			g.write(k, Write{Entries: []Entry{makeEntry(k, EntryID{11 + i, 5 + i})}, HardState: &HardState{5 + i, 1 + i%3, 10 + i}})
			g.run(time.Millisecond)
		}
	},
	"the tail is replaced again and again": func(g *rig) {
		k := ReplicaKey{1, 1}
		g.create(k)
		g.append(k, 11, 5, 6)
		for i := range uint64(6) {
			g.append(k, 16-i, 6+i, 2)
			if i%2 == 1 {
				g.run(time.Millisecond)
			}
		}
		g.run(5 * time.Millisecond)
	},
	"a batch of many replicas": func(g *rig) {
		for i := range 12 {
			g.create(ReplicaKey{block.GroupID(i + 1), 1})
		}
		for range 4 {
			for _, k := range g.keys {
				g.grown(k, 5, 1)
			}
			g.run(2 * time.Millisecond)
		}
	},
	"removed and created under a new id": func(g *rig) {
		for id := range uint64(4) {
			k := ReplicaKey{1, block.ReplicaID(id + 1)}
			g.create(k)
			g.grown(k, 5, 3)
			g.run(2 * time.Millisecond)
			if id < 3 {
				g.remove(k)
			}
		}
		g.run(5 * time.Millisecond)
	},
	"segments are used again": func(g *rig) {
		k := ReplicaKey{1, 1}
		g.create(k)
		for range 16 {
			g.grown(k, 5, 10)
			g.run(2 * time.Millisecond)
			g.saved(1, k)
			g.run(time.Millisecond)
		}
	},
	"survivors are moved": func(g *rig) {
		stay, busy := ReplicaKey{1, 1}, ReplicaKey{9, 1}
		g.create(stay)
		g.create(busy)
		g.grown(stay, 5, 3)
		for range 24 {
			g.grown(busy, 5, 10)
			g.run(2 * time.Millisecond)
			g.saved(0, stay, busy)
			g.run(5 * time.Millisecond)
		}
	},
	"an orderly end": func(g *rig) {
		k := ReplicaKey{1, 1}
		g.create(k)
		g.grown(k, 5, 4)
		g.run(5 * time.Millisecond)
		g.grown(k, 6, 2)
		g.loop.Post(func() { g.log.Close(func(error) {}) })
		g.run(time.Second)
	},
	"a pause, and on": func(g *rig) {
		k := ReplicaKey{1, 1}
		g.create(k)
		for range 3 {
			g.grown(k, 5, 3)
			g.run(200 * time.Millisecond)
			g.saved(1, k)
		}
		g.run(5 * time.Millisecond)
	},
	"a burst": func(g *rig) {
		a, b := ReplicaKey{1, 1}, ReplicaKey{2, 7}
		g.create(a)
		g.create(b)
		for range 20 {
			g.grown(a, 5, 1)
			g.grown(b, 5, 1)
		}
		g.run(20 * time.Millisecond)
		g.saved(2, a, b)
		g.run(5 * time.Millisecond)
	},
	"votes between entries": func(g *rig) {
		a, b := ReplicaKey{1, 1}, ReplicaKey{2, 1}
		g.create(a)
		g.create(b)
		for i := range uint64(6) {
			g.grown(a, 5, 2)
			g.write(b, Write{HardState: &HardState{6 + i, 1 + i%3, 10}})
			g.run(time.Millisecond)
		}
	},
	"a pinned reader": func(g *rig) {
		k := ReplicaKey{1, 1}
		g.create(k)
		g.run(time.Millisecond)
		release := func() {}
		g.loop.Post(func() { release = g.log.Pin() })
		for i := range 10 {
			g.grown(k, 5, 10)
			g.run(2 * time.Millisecond)
			g.saved(0, k)
			if i == 6 {
				release()
			}
			g.run(time.Millisecond)
		}
	},
}
