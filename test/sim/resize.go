package sim

import (
	"time"

	"firn.io/firn/cluster"
	"firn.io/firn/cluster/meta"
	"firn.io/firn/test/stamp"
)

// Sizes of the volume under load. What is cut off by a shrink must read as zero
// when the volume grows again.
var sizes = []int64{20 << 20, 24 << 20, 25<<20 + 4096, 32 << 20}

const largestVolume = 32 << 20

// resizer changes the size of the volume now and then.
type resizer struct {
	c       *Cluster
	w       *workload
	busy    *attachment // the change under way is this one's
	stopped bool
	done    int
}

func (z *resizer) later() {
	c := z.c
	pause := time.Second + time.Duration(c.World.Rand().Int64N(int64(3*time.Second)))
	c.World.At(c.World.Now().Add(pause), func() {
		if z.stopped {
			return
		}
		if a := c.attached(); a != nil && (z.busy == nil || z.busy.over) {
			z.busy = a
			a.loop.Post(func() { z.resize(a) })
		}
		z.later()
	})
}

func (z *resizer) resize(a *attachment) {
	c := z.c
	was, size := a.volume.Geometry().SizeBytes, sizes[c.World.Rand().IntN(len(sizes))]
	answered := func(error) {}
	if size < was && a == c.attached() {
		var op *operation
		op, answered = z.w.change(a, "shrink", size/stamp.SectorBytes, (was-size)/stamp.SectorBytes, nil)
		c.logf("%s: %s", a.seat.name, op.what)
	}
	a.att.StartSettings(c.ctx, cluster.Settings{SizeBytes: size, Shrink: true}, func(_ meta.VolumeMeta, err error) {
		c.logf("%s: size %d instead of %d: %v", a.seat.name, size, was, err)
		answered(err)
		if err == nil {
			z.done++
		}
		if z.busy == a {
			z.busy = nil
		}
	})
}
