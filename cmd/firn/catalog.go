package main

import (
	"context"
	"errors"

	"firn.io/firn/cluster"
	"firn.io/firn/cluster/meta"
	"firn.io/firn/gateway"
	"firn.io/firn/internal/block"
	"firn.io/firn/internal/loop"
)

// catalog is the cluster's volumes for callers that may block: the admin API
// and the gateway. The client itself lives on its loop.
type catalog struct {
	loop   loop.Loop
	store  meta.Store
	client *cluster.Client
}

// answer is what a call on the loop comes back with.
type answer[T any] struct {
	value T
	err   error
}

// call starts something on l and waits for its one answer. An answer that comes
// after ctx has ended goes to late, if that is set.
func call[T any](ctx context.Context, l loop.Loop, start func(done func(T, error)), late func(T)) (T, error) {
	answers := make(chan answer[T], 1)
	l.Post(func() { start(func(v T, err error) { answers <- answer[T]{v, err} }) })
	select {
	case a := <-answers:
		return a.value, a.err
	case <-ctx.Done():
	}
	if late != nil {
		go func() {
			if a := <-answers; a.err == nil {
				late(a.value)
			}
		}()
	}
	var none T
	kind := block.Canceled
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		kind = block.Unavailable
	}
	return none, block.Wrap(kind, ctx.Err(), "no answer from the cluster in time")
}

// CreateVolume returns when the volume can be attached. When ctx ends first the
// volume stays, and becomes ready later.
func (c *catalog) CreateVolume(ctx context.Context, n meta.NewVolume) (meta.VolumeMeta, error) {
	v, err := meta.CreateVolume(ctx, c.store, n)
	if err != nil {
		return v, err
	}
	return call(ctx, c.loop, func(done func(meta.VolumeMeta, error)) {
		c.client.AwaitVolume(ctx, v.ID, func(v meta.VolumeMeta) bool { return v.State == meta.Ready }, done)
	}, nil)
}

// geometry is what a volume shows before it is attached.
func geometry(v meta.VolumeMeta) block.Geometry {
	return block.Geometry{Name: v.Name, ID: v.ID, SizeBytes: v.SizeBytes, LogicalBlockBytes: v.BlockSize,
		PreferredBytes: block.Size, MaxBytes: block.MaxEntryBytes, ReadOnly: v.ReadOnly}
}

// find finds a volume by its name or, if none has that name, by its UUID: a client
// that has the volume finds it again after a rename.
func (c *catalog) find(ctx context.Context, name string) (meta.VolumeMeta, error) {
	v, err := meta.FindVolume(ctx, c.store, name)
	if !errors.Is(err, block.NotFound) {
		return v, err
	}
	id, notUUID := block.ParseUUID(name)
	if notUUID != nil {
		return v, err
	}
	if v, idErr := meta.GetVolume(ctx, c.store, id); idErr == nil && v.State != meta.Deleting {
		return v, nil
	} else if idErr != nil && !errors.Is(idErr, block.NotFound) {
		return v, idErr
	}
	return v, err
}

// storage is the catalog as the gateway sees it.
func (c *catalog) storage() gateway.Storage {
	return gateway.Storage{
		Attach: func(ctx context.Context, id block.VolumeID) (gateway.Backend, error) {
			a, err := call(ctx, c.loop, func(done func(*cluster.Attachment, error)) { c.client.StartAttach(ctx, id, done) },
				func(a *cluster.Attachment) { c.loop.Post(func() { a.Close(func(error) {}) }) })
			if err != nil {
				return nil, err
			}
			return a, nil
		},
		Find: func(ctx context.Context, name string) (block.Geometry, error) {
			v, err := c.find(ctx, name)
			if err == nil && v.State != meta.Ready {
				err = block.Errorf(block.Unavailable, "volume %q is not ready yet: %s", name, v.Waiting)
			}
			return geometry(v), err
		},
		List: func(ctx context.Context) ([]block.Geometry, error) {
			all, err := meta.ListVolumes(ctx, c.store)
			var out []block.Geometry
			for _, v := range all {
				if v.State == meta.Ready {
					out = append(out, geometry(v))
				}
			}
			return out, err
		},
	}
}
