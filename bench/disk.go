package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"
)

const (
	// fillCapacity is the size of the disk whose fill is varied: 64 segments.
	fillCapacity = 4 << 30
	// idleReplicas is how many replicas the idle node has at least.
	idleReplicas = 300
	idleTime     = 20 * time.Second
)

// measureDisk measures what depends on how full a disk is, and on nothing
// happening: lines of Markdown.
func measureDisk(ctx context.Context, firn, dir string, o options) ([]string, error) {
	if !o.disk {
		return nil, nil
	}
	lines := []string{"", "### Write amplification by fill", "",
		fmt.Sprintf("One node, a disk of %d GiB. The volume is written once, then overwritten once in 4 KiB blocks at queue depth 32 before and once while counting. "+
			"Fill is the volume's share of the disk.", int64(fillCapacity)>>30), "",
		"| fill | pattern | op/s | median | p99 | device bytes/user byte | of it survivors | index |", "|---|---|---|---|---|---|---|---|"}
	for _, pattern := range []struct{ name, distribution string }{{"uniform", ""}, {"skewed (zipf 1.1)", "zipf:1.1"}} {
		for _, percent := range []int64{25, 50, 60, 70, 80} {
			line, err := measureFill(ctx, firn, filepath.Join(dir, "fill"), percent, pattern.name, pattern.distribution)
			if err != nil {
				return nil, fmt.Errorf("fill of %d %%, %s: %w", percent, pattern.name, err)
			}
			lines = append(lines, line)
		}
	}
	idle, err := measureIdle(ctx, firn, filepath.Join(dir, "idle"))
	return append(lines, idle...), err
}

func measureFill(ctx context.Context, firn, dir string, percent int64, pattern, distribution string) (string, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	defer os.RemoveAll(dir)
	volume := fillCapacity * percent / 100 &^ (1<<20 - 1)
	run, err := startFirn(ctx, firn, dir, "--nodes", "1", "--capacity", strconv.FormatInt(fillCapacity, 10), "--volume", "fill="+strconv.FormatInt(volume, 10))
	if err != nil {
		return "", err
	}
	defer run.stop()
	if err := run.waitReady(ctx); err != nil {
		return "", err
	}
	uri := "nbd://" + run.nbd + "/fill"
	fmt.Fprintf(os.Stderr, "fill of %d %%, %s\n", percent, pattern)
	fill := job{name: "fill", rw: "write", blockBytes: 1 << 20, depth: 4, sizeBytes: volume}
	over := job{name: "overwrite", rw: "randwrite", blockBytes: 4096, depth: 32, sizeBytes: volume, ioBytes: volume, distribution: distribution}
	for _, j := range []job{fill, over} {
		if _, err := runFio(ctx, uri, j, 0); err != nil {
			return "", errors.Join(err, run.died())
		}
	}
	before, err := run.settled(ctx)
	if err != nil {
		return "", errors.Join(err, run.died())
	}
	res, err := runFio(ctx, uri, over, 0)
	if err != nil {
		return "", errors.Join(err, run.died())
	}
	after, err := run.settled(ctx)
	if err != nil {
		return "", errors.Join(err, run.died())
	}
	d := after.minus(before)
	user := float64(res.bytes)
	return fmt.Sprintf("| %d %% | %s | %.0f | %v | %v | %.2f | %.2f | %.2f |", percent, pattern, res.iops, res.median.Round(time.Microsecond), res.p99.Round(time.Microsecond),
		(d.batches+d.moved+d.zeroed+d.index)/user, d.moved/user, d.index/user), nil
}

// measureIdle is the processor time of a node with many replicas and no load.
func measureIdle(ctx context.Context, firn, dir string) ([]string, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	run, err := startFirn(ctx, firn, dir, "--nodes", "1", "--volume", "many=64T")
	if err != nil {
		return nil, err
	}
	defer run.stop()
	if err := run.waitReady(ctx); err != nil {
		return nil, err
	}
	made := 1
	for {
		n, err := run.replicas(ctx)
		if err != nil {
			return nil, errors.Join(err, run.died())
		}
		if n >= idleReplicas {
			break
		}
		if made > idleReplicas {
			return nil, fmt.Errorf("%d volumes have %d replicas in sum", made, n)
		}
		made++
		if err := run.createVolume(ctx, fmt.Sprintf("many%d", made)); err != nil {
			return nil, errors.Join(err, run.died())
		}
	}
	if _, err := run.settled(ctx); err != nil {
		return nil, err
	}
	n, err := run.replicas(ctx)
	if err != nil {
		return nil, err
	}
	timer := time.NewTimer(idleTime)
	defer timer.Stop()
	pid := run.cmd.Process.Pid
	before, err := processTime(pid)
	if err != nil {
		return nil, err
	}
	select {
	case <-timer.C:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	after, err := processTime(pid)
	if err != nil {
		return nil, err
	}
	share := float64(after-before) / float64(idleTime) * 100
	fmt.Fprintf(os.Stderr, "idle, %d replicas: %.2f %% of a core\n", n, share)
	return []string{"", "### Idle", "", fmt.Sprintf("`firn up` (etcd, one node, one gateway) with %d replicas and no load, over %v: **%.2f %% of a core** (aim for the node: under 1 %%).", n, idleTime, share)}, nil
}

// command runs a command of the firn command line against the server.
func (r *running) command(ctx context.Context, args ...string) ([]byte, error) {
	out, err := exec.CommandContext(ctx, r.firn, append(args, "--api", r.api)...).Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			err = fmt.Errorf("%w: %s", err, exit.Stderr)
		}
		return nil, fmt.Errorf("firn %s: %w", args[0], err)
	}
	return out, nil
}

func (r *running) createVolume(ctx context.Context, name string) error {
	_, err := r.command(ctx, "volume", "create", name, "64T")
	return err
}

// replicas is how many the nodes have in sum.
func (r *running) replicas(ctx context.Context) (n int, err error) {
	out, err := r.command(ctx, "status", "--json")
	if err != nil {
		return 0, err
	}
	var status struct {
		Nodes []struct {
			Replicas int `json:"replicas"`
		} `json:"nodes"`
	}
	if err := json.Unmarshal(out, &status); err != nil {
		return 0, err
	}
	for _, node := range status.Nodes {
		n += node.Replicas
	}
	return n, nil
}
