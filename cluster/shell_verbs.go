package cluster

import (
	"context"
	"sync/atomic"
	"time"

	"firn.io/firn/cluster/meta"
	"firn.io/firn/internal/block"
)

// signal tells many goroutines that something has ended.
type signal struct{ c chan struct{} }

func newSignal() signal { return signal{make(chan struct{})} }

// give may be called once.
func (s signal) give() { close(s.c) }

// answer is what a caller waits for.
type answer[T any] struct {
	value T
	err   error
}

// grace is how long a caller whose ctx has ended waits for the error of what was
// started, which ends with the same ctx and knows what it waited for.
const grace = time.Second

// await starts something on the loop and waits for its answer. unwanted, which
// may be nil, is called on the loop with an answer that came too late.
func await[T any](ctx context.Context, c *Client, start func(done func(T, error)), unwanted func(T)) (T, error) {
	got := make(chan answer[T], 1)
	var over atomic.Bool // the first of answer and caller's end sets it
	c.loop.Post(func() {
		start(func(v T, err error) {
			if over.CompareAndSwap(false, true) {
				got <- answer[T]{v, err}
			} else if err == nil && unwanted != nil {
				unwanted(v)
			}
		})
	})
	var why error
	select {
	case a := <-got:
		return a.value, a.err
	case <-c.stopped.c:
		why = block.Errorf(block.Canceled, "this process is stopping")
	case <-ctx.Done():
		why = block.Wrap(block.Canceled, context.Cause(ctx), "no answer in time")
		patience := time.NewTimer(grace)
		defer patience.Stop()
		select {
		case a := <-got:
			return a.value, a.err
		case <-patience.C:
		}
	}
	if !over.CompareAndSwap(false, true) {
		a := <-got
		return a.value, a.err
	}
	var none T
	return none, why
}

// Attach attaches a volume and waits for it. See StartAttach.
func (c *Client) Attach(ctx context.Context, id block.VolumeID) (*Attachment, error) {
	return await(ctx, c, func(done func(*Attachment, error)) { c.StartAttach(ctx, id, done) },
		func(a *Attachment) { a.Close(func(error) {}) })
}

// Find tells the geometry of the volume of that name, attached or not. A volume
// that is attached here is found also while the metadata store is away.
func (c *Client) Find(ctx context.Context, name string) (block.Geometry, error) {
	v, err := meta.FindVolume(ctx, c.cfg.Store, name)
	if err == nil {
		return geometryOf(v), nil
	}
	if block.KindOf(err) != block.Unavailable {
		return block.Geometry{}, err
	}
	return await(ctx, c, func(done func(block.Geometry, error)) {
		for _, a := range c.attached {
			if a.vol.Name == name {
				done(a.Geometry(), nil)
				return
			}
		}
		done(block.Geometry{}, err)
	}, nil)
}

// List tells the geometries of all volumes that can be attached, by name.
func (c *Client) List(ctx context.Context) ([]block.Geometry, error) {
	all, err := meta.ListVolumes(ctx, c.cfg.Store)
	if err != nil {
		return nil, err
	}
	var out []block.Geometry
	for _, v := range all {
		if v.State == meta.Ready {
			out = append(out, geometryOf(v))
		}
	}
	return out, nil
}

func geometryOf(v meta.VolumeMeta) block.Geometry {
	return block.Geometry{Name: v.Name, ID: v.ID, SizeBytes: v.SizeBytes, LogicalBlockBytes: v.BlockSize,
		PreferredBytes: block.Size, MaxBytes: block.MaxEntryBytes, ReadOnly: v.ReadOnly}
}

// CreateVolume creates a volume and waits until it can be attached. When ctx
// ends first the error says what it waits for, and the volume stays.
func (c *Client) CreateVolume(ctx context.Context, n meta.NewVolume) (meta.VolumeMeta, error) {
	v, err := meta.CreateVolume(ctx, c.cfg.Store, n)
	if err != nil {
		return v, err
	}
	return await(ctx, c, func(done func(meta.VolumeMeta, error)) {
		c.AwaitVolume(ctx, v.ID, func(v meta.VolumeMeta) bool { return v.State == meta.Ready }, done)
	}, nil)
}

// ResizeVolume changes the size of a volume and waits until it holds
// everywhere. A smaller size needs shrink. See StartSettings.
func (c *Client) ResizeVolume(ctx context.Context, name string, sizeBytes int64, shrink bool) (meta.VolumeMeta, error) {
	if sizeBytes <= 0 {
		return meta.VolumeMeta{}, block.Errorf(block.Invalid, "size %d: it must be above 0", sizeBytes)
	}
	return c.changeSettings(ctx, name, Settings{SizeBytes: sizeBytes, Shrink: shrink})
}

// SetReadOnly changes whether a volume takes writes, and waits until that holds
// everywhere.
func (c *Client) SetReadOnly(ctx context.Context, name string, readOnly bool) (meta.VolumeMeta, error) {
	return c.changeSettings(ctx, name, Settings{ReadOnly: &readOnly})
}

func (c *Client) changeSettings(ctx context.Context, name string, s Settings) (meta.VolumeMeta, error) {
	v, err := meta.FindVolume(ctx, c.cfg.Store, name)
	if err != nil {
		return v, err
	}
	return await(ctx, c, func(done func(meta.VolumeMeta, error)) { c.StartSettings(ctx, v.ID, s, done) }, nil)
}

// ForceDetach takes a volume from its owner, which may be alive and have
// clients; it is fenced by the next owner, who waits a lease's time first (F3).
// It returns the owner that was removed. Kind NotFound if nobody has it.
func (c *Client) ForceDetach(ctx context.Context, name string) (meta.OwnerMeta, error) {
	v, err := meta.FindVolume(ctx, c.cfg.Store, name)
	if err != nil {
		return meta.OwnerMeta{}, err
	}
	return meta.ForceOwner(ctx, c.cfg.Store, v.ID)
}
