package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"os/exec"
	"strconv"
	"time"
)

// volumeBytes is the size of the volume that every server serves.
const volumeBytes = 1 << 30

type job struct {
	name       string
	rw         string
	blockBytes int
	depth      int
	// sizeBytes of the volume are used, all if it is 0; ioBytes are written or
	// read in sum, once over that if it is 0 and there is no time.
	sizeBytes, ioBytes int64
	distribution       string // of random offsets; fio's name, uniform if empty
	// settles: what the index writes up to the next checkpoint counts too, which
	// is a minute away.
	settles bool
}

var jobs = []job{
	{name: "4 KiB random read, 1", rw: "randread", blockBytes: 4096, depth: 1},
	{name: "4 KiB random read, 32", rw: "randread", blockBytes: 4096, depth: 32},
	{name: "4 KiB random write, 1", rw: "randwrite", blockBytes: 4096, depth: 1},
	{name: "4 KiB random write, 32", rw: "randwrite", blockBytes: 4096, depth: 32, settles: true},
	{name: "1 MiB read, 4", rw: "read", blockBytes: 1 << 20, depth: 4},
	{name: "1 MiB write, 4", rw: "write", blockBytes: 1 << 20, depth: 4},
}

func (j job) writes() bool { return j.rw == "write" || j.rw == "randwrite" }

type fioResult struct {
	ops         int64
	bytes       int64
	iops        float64
	bytesPerSec float64
	median, p99 time.Duration
	clientCPU   time.Duration
}

// fioSide is the part of fio's JSON for one direction.
type fioSide struct {
	IOBytes  int64   `json:"io_bytes"`
	TotalIOs int64   `json:"total_ios"`
	IOPS     float64 `json:"iops"`
	BWBytes  float64 `json:"bw_bytes"`
	Clat     struct {
		Percentile map[string]int64 `json:"percentile"`
	} `json:"clat_ns"`
}

// runFio runs one job for the given time, or once over the volume if it is 0.
func runFio(ctx context.Context, uri string, j job, each time.Duration) (fioResult, error) {
	args := []string{"--name=bench", "--ioengine=nbd", "--uri=" + uri, "--rw=" + j.rw,
		"--bs=" + strconv.Itoa(j.blockBytes), "--iodepth=" + strconv.Itoa(j.depth),
		"--size=" + strconv.FormatInt(cmp.Or(j.sizeBytes, volumeBytes), 10), "--randrepeat=1", "--norandommap", "--refill_buffers",
		"--output-format=json"}
	if j.ioBytes > 0 {
		args = append(args, "--io_size="+strconv.FormatInt(j.ioBytes, 10))
	}
	if j.distribution != "" {
		args = append(args, "--random_distribution="+j.distribution)
	}
	if each > 0 {
		args = append(args, "--time_based", "--runtime="+strconv.Itoa(int(each.Seconds())))
	}
	cmd := exec.CommandContext(ctx, "fio", args...)
	out, err := cmd.Output()
	if err != nil {
		if e, ok := err.(*exec.ExitError); ok {
			return fioResult{}, fmt.Errorf("fio: %w: %s%s", err, out, e.Stderr)
		}
		return fioResult{}, fmt.Errorf("fio: %w", err)
	}
	// Engines print notes on the same stream, before the JSON.
	out = out[max(0, bytes.IndexByte(out, '{')):]
	var parsed struct {
		Jobs []struct {
			Error       int `json:"error"`
			Read, Write fioSide
			UsrCPU      float64 `json:"usr_cpu"`
			SysCPU      float64 `json:"sys_cpu"`
			RuntimeMS   int64   `json:"job_runtime"`
		} `json:"jobs"`
	}
	if err := json.Unmarshal(out, &parsed); err != nil || len(parsed.Jobs) != 1 {
		return fioResult{}, fmt.Errorf("fio's answer cannot be read: %v", err)
	}
	f := parsed.Jobs[0]
	if f.Error != 0 {
		return fioResult{}, fmt.Errorf("fio ended with error %d", f.Error)
	}
	side := f.Read
	if j.writes() {
		side = f.Write
	}
	return fioResult{ops: side.TotalIOs, bytes: side.IOBytes, iops: side.IOPS, bytesPerSec: side.BWBytes,
		median:    time.Duration(side.Clat.Percentile["50.000000"]),
		p99:       time.Duration(side.Clat.Percentile["99.000000"]),
		clientCPU: time.Duration((f.UsrCPU + f.SysCPU) / 100 * float64(f.RuntimeMS) * float64(time.Millisecond))}, nil
}
