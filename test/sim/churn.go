package sim

import (
	"errors"
	"fmt"
	"time"

	"firn.io/firn/cluster"
	"firn.io/firn/cluster/meta"
	"firn.io/firn/gateway"
	"firn.io/firn/internal/block"
	"firn.io/firn/internal/clock"
	"firn.io/firn/test/stamp"
)

const (
	churnBytes   = 8 << 20
	churnWrites  = 40
	churnPause   = 50 * time.Millisecond
	churnPatient = 12 * time.Second // before a step that does not end is given up
)

// churner creates a volume, writes to it, deletes it and creates one of the same
// name again, beside the load: a new volume reads as zero, and of a deleted one
// nothing stays live.
type churner struct {
	c       *Cluster
	step    churnStep
	since   clock.Instant // of the step
	id      block.VolumeID
	g       *process
	volume  *gateway.Volume
	history *stamp.History
	writes  int
	stopped bool
	deleted int
	fault   error
}

type churnStep uint8

const (
	churnCreate churnStep = iota
	churnAwait
	churnAttach
	churnWrite
	churnDelete
	churnGone
)

const churnName = "churn"

// poll does what the step asks for, again and again.
func (h *churner) poll() {
	c := h.c
	if h.stopped && h.step == churnCreate {
		return
	}
	c.World.At(c.World.Now().Add(churnPause), h.poll)
	late := c.World.Now().Sub(h.since) > churnPatient
	switch h.step {
	case churnCreate:
		h.id = block.VolumeID(c.uuid())
		_, err := meta.CreateVolume(c.ctx, c.Meta.Client(), meta.NewVolume{ID: h.id, Name: churnName, SizeBytes: churnBytes, Replicas: c.volume.Replicas})
		switch {
		case err == nil:
			h.enter(churnAwait)
		case errors.Is(err, block.Exists): // of a life that the metadata's backup had
			h.enter(churnDelete)
		}
	case churnAwait:
		v, err := meta.GetVolume(c.ctx, c.Meta.Client(), h.id)
		if a := c.attached(); err == nil && v.State == meta.Ready && a != nil {
			h.g = a.process
			h.enter(churnAttach)
			h.g.loop.Post(h.attach)
		} else if late || errors.Is(err, block.NotFound) {
			h.enter(churnDelete)
		}
	case churnAttach, churnWrite:
		if h.g.seat.process != h.g || late {
			h.volume = nil
			h.enter(churnDelete)
		}
	case churnDelete:
		switch _, err := meta.DeleteVolume(c.ctx, c.Meta.Client(), churnName); {
		case err == nil || errors.Is(err, block.NotFound):
			h.enter(churnGone)
		case errors.Is(err, block.Busy) && late:
			c.force(h.id)
			h.since = c.World.Now()
		}
	case churnGone:
		if _, err := meta.GetVolume(c.ctx, c.Meta.Client(), h.id); errors.Is(err, block.NotFound) {
			h.deleted++
			h.enter(churnCreate)
		} else if late { // a backup of the metadata forgot that it was deleted
			h.enter(churnDelete)
		}
	}
}

func (h *churner) enter(s churnStep) { h.step, h.since = s, h.c.World.Now() }

func (h *churner) attach() {
	c, id := h.c, h.id
	h.g.client.StartAttach(c.ctx, id, func(a *cluster.Attachment, err error) {
		switch {
		case err != nil && h.step == churnAttach && h.id == id:
			h.enter(churnDelete)
		case err != nil:
		case h.step != churnAttach || h.id != id:
			a.Close(func(error) {})
		default:
			h.history, h.writes = stamp.NewHistory(id), 0
			v := gateway.NewVolume(h.g.loop, a, gateway.Limits{}, nil)
			h.volume = v
			h.enter(churnWrite)
			h.read(v, func() { h.write(v) })
		}
	})
}

// read judges the whole volume.
func (h *churner) read(v *gateway.Volume, then func()) {
	rd := h.history.BeginRead(0)
	v.ReadAsync(h.c.ctx, 0, churnBytes, func(p []byte, err error) {
		if err != nil {
			rd.Failed()
			return
		}
		if err := rd.Check(p); err != nil && h.fault == nil {
			h.fault = fmt.Errorf("volume %v, which is one of many of the same name: %w", h.id, err)
		}
		if h.volume == v {
			then()
		}
	})
}

// write writes one piece after the other, reads all, and detaches.
func (h *churner) write(v *gateway.Volume) {
	if h.volume != v {
		return
	}
	if h.writes == churnWrites {
		h.read(v, func() {
			h.volume = nil
			v.Detach(func(error) {})
			h.enter(churnDelete)
		})
		return
	}
	h.writes++
	const sectors = churnBytes / stamp.SectorBytes
	n := 1 + h.c.World.Rand().Int64N(64)
	from := h.c.World.Rand().Int64N(sectors - n)
	p := make([]byte, n*stamp.SectorBytes)
	wr := h.history.Begin(1, from, n, p)
	v.WriteAsync(h.c.ctx, p, from*stamp.SectorBytes, func(err error) {
		if err != nil {
			wr.Unknown()
			return // poll gives it up
		}
		wr.Acked()
		h.write(v)
	})
}
