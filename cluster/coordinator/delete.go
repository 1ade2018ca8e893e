package coordinator

import (
	"firn.io/firn/cluster/meta"
	"firn.io/firn/internal/block"
	"firn.io/firn/internal/loop"
)

// deletion is one volume on its way out. A coordinator that takes over tells
// all groups again: it is idempotent, and cheaper than to note who was told.
type deletion struct {
	volume     meta.VolumeMeta
	left       []block.GroupID // to be told
	unanswered int             // groups that have not confirmed, those in left too
}

// delete begins the deletion of a volume, or goes on with it as far as the
// bound on groups that are told at once allows.
func (l *leadership) delete(v meta.VolumeMeta) {
	d, going := l.deletes[v.ID]
	if !going {
		groups := v.Groups()
		d = &deletion{volume: v, left: groups, unanswered: len(groups)}
		l.deletes[v.ID] = d
		if d.unanswered == 0 {
			l.remove(d)
		}
	}
	for len(d.left) > 0 && l.telling < maxDeletes {
		g := d.left[0]
		d.left = d.left[1:]
		if _, exists := l.view.groups[g]; exists {
			l.tell(d, g)
		} else { // a group that is gone holds nothing
			l.confirmed(d)
		}
	}
}

func (l *leadership) tell(d *deletion, g block.GroupID) {
	l.telling++
	l.c.cfg.Deleter.DeleteInGroup(l.ctx, d.volume, g, func(err error) {
		if l.over {
			return
		}
		l.telling--
		l.schedule()
		if err == nil {
			l.confirmed(d)
			return
		}
		l.c.cfg.Log.Warn("coordinator: will try again", "step", "delete a volume in a group", "volume", d.volume.ID, "group", g, "error", err)
		l.c.cfg.Loop.After(retryDelay, func() {
			d.left = append(d.left, g)
			l.schedule()
		})
	})
}

func (l *leadership) confirmed(d *deletion) {
	if d.unanswered--; d.unanswered == 0 {
		l.remove(d)
	}
}

func (l *leadership) remove(d *deletion) {
	var err error
	l.c.cfg.Loop.Do(loop.Meta, func() {
		err = meta.RemoveVolume(l.ctx, l.c.cfg.Store, l.guard, d.volume.ID)
	}, func() {
		switch {
		case l.over:
		case err == nil:
			l.view.dropVolume(d.volume.ID)
			delete(l.deletes, d.volume.ID)
			l.schedule()
		case l.failed("remove a deleted volume", err):
		default:
			l.c.cfg.Loop.After(retryDelay, func() {
				if !l.over {
					l.remove(d)
				}
			})
		}
	})
}
