package coordinator

import (
	"context"

	"firn.io/firn/cluster/meta"
	"firn.io/firn/internal/block"
	"firn.io/firn/internal/clock"
	"firn.io/firn/internal/loop"
)

// leadership is the work of one elected term. At most one change of layouts is
// under way: the next plan then knows what the last one did, and volumes that
// are created at the same time do not all choose the same groups. Deletions run
// beside it.
type leadership struct {
	c      *Coordinator
	guard  meta.Guard
	ctx    context.Context // ends with the leadership
	cancel context.CancelFunc
	over   bool

	view    *view
	mirrors []*meta.Mirror
	// busy: a change of layouts is under way, or a pause after a failed one.
	// arrived, if set: it is done, and this tells whether the mirrors know.
	busy      bool
	arrived   func() bool
	scheduled bool
	deletes   map[block.VolumeID]*deletion
	absent    map[block.DiskID]clock.Instant // since when, as seen here
	away      map[block.NodeID]clock.Instant // since when, as seen here
	telling   int                            // groups that are being told of a deletion
}

func newLeadership(c *Coordinator, guard meta.Guard) *leadership {
	l := &leadership{c: c, guard: guard, view: newView(), deletes: map[block.VolumeID]*deletion{}, absent: map[block.DiskID]clock.Instant{},
		away: map[block.NodeID]clock.Instant{}}
	for _, m := range []struct {
		prefix  string
		changed func(meta.KV) error
	}{
		{meta.NodesPrefix, l.nodeChanged},
		{meta.LivePrefix, l.liveChanged},
		{meta.GroupsPrefix, l.groupChanged},
		{meta.VolumesPrefix, l.volumeChanged},
	} {
		l.mirrors = append(l.mirrors, meta.NewMirror(c.cfg.Loop, c.cfg.Store, m.prefix, func(kv meta.KV) {
			if err := m.changed(kv); err != nil {
				c.cfg.Log.Error("coordinator: a key of the catalog is ignored", "error", err)
			}
		}, l.schedule))
	}
	return l
}

func (l *leadership) start() {
	l.c.cfg.Log.Info("coordinator: elected", "node", l.c.cfg.Node)
	l.ctx, l.cancel = context.WithCancel(l.c.ctx)
	for _, m := range l.mirrors {
		m.Start(l.ctx)
	}
	l.relistLater()
}

func (l *leadership) stop() {
	l.over = true
	for _, m := range l.mirrors {
		m.Stop()
	}
	l.cancel()
	l.c.cfg.Log.Info("coordinator: no longer elected", "node", l.c.cfg.Node)
}

func (l *leadership) relistLater() {
	l.c.cfg.Loop.After(relistEvery, func() {
		if !l.over {
			l.relist()
			l.relistLater()
		}
	})
}

func (l *leadership) relist() {
	for _, m := range l.mirrors {
		m.Relist()
	}
}

// volumes is the mirror of the volumes.
func (l *leadership) volumes() *meta.Mirror { return l.mirrors[len(l.mirrors)-1] }

func (l *leadership) ready() bool {
	for _, m := range l.mirrors {
		if !m.Ready() {
			return false
		}
	}
	return true
}

func (l *leadership) nodeChanged(kv meta.KV) error {
	id, err := meta.ParseNodeKey(kv.Key)
	if err != nil || !kv.Exists() {
		delete(l.view.nodes, id)
		return err
	}
	n, err := meta.DecodeNode(kv)
	if err == nil {
		l.view.nodes[id] = n
	}
	return err
}

func (l *leadership) liveChanged(kv meta.KV) error {
	id, err := meta.ParseNodeKey(kv.Key)
	if err == nil && kv.Exists() {
		l.view.live[id] = true
	} else {
		delete(l.view.live, id)
	}
	return err
}

func (l *leadership) groupChanged(kv meta.KV) error {
	id, err := meta.ParseGroupKey(kv.Key)
	if err != nil || !kv.Exists() {
		delete(l.view.groups, id)
		return err
	}
	g, err := meta.DecodeGroup(kv)
	if err == nil {
		l.view.groups[id] = g
	}
	return err
}

func (l *leadership) volumeChanged(kv meta.KV) error {
	id, err := meta.ParseVolumeKey(kv.Key)
	if err != nil || !kv.Exists() {
		l.view.dropVolume(id)
		delete(l.deletes, id)
		return err
	}
	v, err := meta.DecodeVolume(kv)
	if err == nil {
		l.view.putVolume(v)
	}
	return err
}

// schedule looks for work at the end of this turn.
func (l *leadership) schedule() {
	if l.over || l.scheduled {
		return
	}
	l.scheduled = true
	l.c.cfg.Loop.Defer(func() {
		l.scheduled = false
		if !l.over && l.ready() {
			l.work()
		}
	})
}

// work begins what can be begun.
func (l *leadership) work() {
	if l.arrived != nil && l.arrived() {
		l.busy, l.arrived = false, nil
	}
	for _, v := range l.view.work() {
		switch {
		case v.State == meta.Deleting:
			l.delete(v)
		case !l.busy:
			l.layOut(v)
		}
	}
	l.repair()
}

// layOut takes a volume that lacks spans one step further.
func (l *leadership) layOut(v meta.VolumeMeta) {
	p := l.view.plan(v, l.c.cfg.MaxGroupsPerDisk)
	switch {
	case p.create != nil:
		l.createGroups(p.create)
	case p.spans != nil:
		l.appendSpans(v, p.spans)
	case p.waiting != v.Waiting:
		l.changeVolume(v.ID, func(now *meta.VolumeMeta) bool {
			changed := now.State != meta.Deleting && now.Waiting != p.waiting
			now.Waiting = p.waiting
			return changed
		})
	}
}

// step runs one blocking step of the layouts. After it, the next one waits until
// arrived says that the mirrors have told what it did, so that the view is never
// ahead of its mirrors nor a plan made on what was before.
func (l *leadership) step(what string, run func() error, arrived func() bool) {
	l.busy = true
	var err error
	l.c.cfg.Loop.Do(loop.Meta, func() { err = run() }, func() {
		switch {
		case l.over:
		case err == nil:
			l.arrived = arrived
			l.c.cfg.Loop.After(hintPatience, func() {
				if !l.over && l.busy && !arrived() {
					l.relist() // the hint is lost, or the store was restored
					l.free()
				}
			})
			l.schedule()
		case !l.failed(what, err):
			// Whether it happened is unknown: look before the next step.
			l.relist()
			l.c.cfg.Loop.After(retryDelay, l.free)
		}
	})
}

// free lets the next change of layouts begin.
func (l *leadership) free() {
	l.busy, l.arrived = false, nil
	l.schedule()
}

// failed deals with the error of a step; it tells whether that ended the leadership.
func (l *leadership) failed(what string, err error) bool {
	if block.KindOf(err) == block.Fenced {
		l.c.depose()
		return true
	}
	if block.KindOf(err) != block.NotFound { // a volume that was deleted meanwhile is no news
		l.c.cfg.Log.Warn("coordinator: will try again", "step", what, "error", err)
	}
	return false
}

func (l *leadership) createGroups(places [][]meta.Place) {
	var made []meta.GroupMeta
	l.step("create groups", func() (err error) {
		made, err = meta.CreateGroups(l.ctx, l.c.cfg.Store, l.guard, places)
		return err
	}, func() bool {
		_, told := l.view.groups[made[len(made)-1].ID]
		return told
	})
}

// appendSpans gives a volume its missing spans, if it still is as it was
// planned for, and makes it ready.
func (l *leadership) appendSpans(v meta.VolumeMeta, spans [][]block.GroupID) {
	had := len(v.Spans)
	l.changeVolume(v.ID, func(now *meta.VolumeMeta) bool {
		if now.State == meta.Deleting || len(now.Spans) != had || missingSpans(*now) < len(spans) || now.Replicas != v.Replicas {
			return false
		}
		now.Spans = append(now.Spans, spans...)
		now.Layout++
		now.Waiting = ""
		if missingSpans(*now) == 0 {
			now.State = meta.Ready
		}
		return true
	})
}

func (l *leadership) changeVolume(id block.VolumeID, change func(*meta.VolumeMeta) bool) {
	var at meta.Revision
	l.step("lay a volume out", func() (err error) {
		_, at, err = meta.ChangeVolume(l.ctx, l.c.cfg.Store, l.guard, id, change)
		return err
	}, func() bool {
		kv := l.volumes().Get(meta.VolumeKey(id))
		return !kv.Exists() || kv.Modified >= at
	})
}
